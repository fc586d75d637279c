// The curve shown in a Calibrated Strength node, and the button that keeps a curve from a linked node.

import { app } from '../../../scripts/app.js'
import {
  forwardWheel,
  isInGraph,
  locatorId,
  reattachElement,
  updateAfterGraphChange
} from '../shared/dom_widget.mjs'
import { button, element } from '../shared/elements.mjs'
import { t } from '../shared/texts.mjs'
import { parse } from './curve.mjs'
import { draw } from './drawing.mjs'

/** @import { Point } from './curve.mjs' */

/**
 * @typedef {object} RunOutput the node's output of a run, as the page keeps it; each list has one item
 * @property {string[]} curve the text that was used
 * @property {Point[][]} points closely spaced points of the curve; none if calibration was off
 */

export const NODE = 'EditSlidersCalibratedStrength'
const MIN_HEIGHT = 200
const MARGIN = 10
const MIN_WIDTH = 320
const STYLE = `
.es-curve { display: flex; flex-direction: column; gap: 4px; height: 100%; min-height: ${MIN_HEIGHT}px;
  box-sizing: border-box; font: 12px sans-serif; color: var(--input-text, #ddd); }
.es-curve [hidden] { display: none; }
.es-plot { flex: 1; min-height: 0; display: flex; background: var(--comfy-input-bg, #222); border-radius: 4px; }
.es-plot svg { width: 100%; height: 100%; }
.es-plot p { margin: auto; padding: 8px; overflow-wrap: anywhere; text-align: center;
  color: var(--descrip-text, #999); }
.es-plot p.es-curve-error { color: var(--error-text, #f0716b); }
.es-plot text { font: 10px sans-serif; fill: var(--descrip-text, #999); text-anchor: middle; }
.es-plot .es-tick { text-anchor: end; }
.es-plot .es-current { font-size: 11px; text-anchor: end; fill: var(--input-text, #ddd); }
.es-plot polyline { fill: none; }
.es-plot line { stroke: var(--border-color, #4e4e4e); stroke-width: 0.5; }
.es-identity { stroke: var(--descrip-text, #999); stroke-dasharray: 4 4; }
.es-unused .es-identity { opacity: 0.5; }
.es-line { stroke: #61afef; stroke-width: 2; stroke-linejoin: round; }
.es-point { fill: #61afef; }
.es-guide { stroke: var(--input-text, #ddd); stroke-width: 0.75; stroke-dasharray: 2 2; }
.es-marker { fill: var(--input-text, #ddd); stroke: var(--comfy-input-bg, #222); stroke-width: 1.5; }
.es-keep-curve { background: #454545; color: #ddd; border: 0; border-radius: 3px; padding: 2px 7px; cursor: pointer;
  font: inherit; align-self: start; }
`

/** @type {WeakMap<LGraphNode, CurveView>} */
const views = new WeakMap()

/**
 * Key of a node and its linked curve output -> text of the curve in the last run. Kept outside the nodes, since undo
 * creates new nodes with the same ids.
 * @type {Map<string, string>}
 */
const receivedCurves = new Map()

/** Add the curve to a new Calibrated Strength. @param {LGraphNode} node */
export function addCurve(node) {
  views.set(node, new CurveView(node))
}

/** Update a Calibrated Strength after the page has changed to another graph. @param {LGraphNode} node of any type */
export function reattachCurve(node) {
  const view = views.get(node)
  if (view) updateAfterGraphChange(() => view.reattach())
}

class CurveView {
  /** @param {LGraphNode} node */
  constructor(node) {
    this.node = node
    this.plot = element('div', 'es-plot')
    this.keepButton = button(t('keepCurve'), t('keepCurveTip'), () => this.keepCurve())
    this.keepButton.className = 'es-keep-curve'
    this.element = element('div', 'es-curve')
    this.element.append(element('style', '', { textContent: STYLE }), this.plot, this.keepButton)
    this.element.addEventListener('wheel', forwardWheel)
    this.drawnState = ''
    const widget = /** @type {NodeWithDOMWidgets} */ (node).addDOMWidget('drawing', 'EDIT_SLIDERS_CURVE', this.element, {
      serialize: false,
      getMinHeight: () => MIN_HEIGHT + 2 * MARGIN
    })
    widget.serialize = false
    this.refreshOnChanges()
    const [width, height] = node.computeSize()
    node.setSize([Math.max(width, MIN_WIDTH), height])
    this.refresh()
  }

  refreshOnChanges() {
    const { node } = this
    const refresh = () => this.refresh()
    for (const name of ['position', 'curve', 'on']) callAfter(this.widget(name), 'callback', refresh)
    callAfter(node, 'onConfigure', refresh)
    callAfter(node, 'onConnectionsChange', refresh)
    callAfter(node, 'onExecuted', () => {
      if (this.runOutput) receivedCurves.set(this.receivedKey, String(this.runOutput.curve.at(-1)))
      this.refresh()
    })
  }

  /** @param {string} name @returns {Widget} */
  widget(name) {
    const widget = this.node.widgets?.find((widget) => widget.name === name)
    if (widget) return widget
    throw new Error(`Calibrated Strength has no widget '${name}': reload the page after updating Edit Sliders.`)
  }

  /** @param {string} name @returns {number} index of the input, -1 if there is none */
  inputIndex(name) {
    return this.node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1
  }

  /** The node id and output index that an input is linked to, as `id:index`; or ''. @param {string} name */
  linkOrigin(name) {
    const id = this.node.inputs?.[this.inputIndex(name)]?.link
    const link = id == null ? undefined : this.node.graph?.getLink(id)
    return link ? `${link.origin_id}:${link.origin_slot}` : ''
  }

  /** @returns {RunOutput | undefined} */
  get runOutput() {
    const output = /** @type {Record<string, any>} */ (app.nodeOutputs)[locatorId(this.node)]
    return output?.curve ? output : undefined
  }

  get receivedKey() {
    return `${locatorId(this.node)} ${this.linkOrigin('curve')}`
  }

  /** @returns {string | undefined} the curve's text; undefined if it is linked and not known before the next run */
  get text() {
    if (!this.linkOrigin('curve')) return String(this.widget('curve').value ?? '')
    const received = receivedCurves.get(this.receivedKey)
    return received === this.runOutput?.curve.at(-1) ? received : undefined
  }

  /** @returns {number | undefined} undefined if it is linked */
  get position() {
    const { value } = this.widget('position')
    return typeof value === 'number' && Number.isFinite(value) && !this.linkOrigin('position') ? value : undefined
  }

  /** Put the element back into the node, and draw the curve of the current graph. */
  reattach() {
    if (!isInGraph(this.node)) return
    reattachElement(this.node, this.element)
    this.refresh()
  }

  /** Draw the curve if anything it depends on has changed. */
  refresh() {
    const { text, position } = this
    const on = this.widget('on').value !== false || this.linkOrigin('on') !== ''
    const { points, error } = parse((on && text) || '')
    const computed = this.runOutput?.curve.at(-1) === text ? this.runOutput?.points.at(-1) : undefined
    const line = computed?.length && points.length ? computed : points
    const unknown = on && text === undefined
    const state = JSON.stringify([line, points, position, error, unknown])
    this.keepButton.hidden = !this.linkOrigin('curve') || !text || !parse(text).points.length
    if (state === this.drawnState) return
    this.drawnState = state
    if (error) this.plot.replaceChildren(element('p', 'es-curve-error', { textContent: error, role: 'status' }))
    else if (unknown) this.plot.replaceChildren(element('p', '', { textContent: t('curveLinked') }))
    else this.plot.replaceChildren(draw({ points, line, position }))
  }

  /** Write the linked curve into the node's own widget and remove the link, as one undo step. */
  keepCurve() {
    const { text } = this
    if (text === undefined) return
    const widget = this.widget('curve')
    app.canvas.emitBeforeChange()
    this.node.disconnectInput(this.inputIndex('curve'))
    widget.value = text
    widget.callback?.(text)
    app.canvas.emitAfterChange()
  }
}

/**
 * Wrap a method so that `act` is called after it.
 * @param {Record<string, any>} owner
 * @param {string} name
 * @param {() => void} act
 */
function callAfter(owner, name, act) {
  const original = owner[name]
  owner[name] = (/** @type {unknown[]} */ ...args) => {
    original?.apply(owner, args)
    act()
  }
}
