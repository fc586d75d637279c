// Shows in a Calibrated Strength node its curve, and keeps a curve that comes from another node if asked to.

import { app } from '../../../scripts/app.js'
import { button, element } from '../slider_prompt/elements.mjs'
import { forward } from '../slider_prompt/node.mjs'
import { t } from '../texts.mjs'
import { parse } from './curve.mjs'
import { draw } from './drawing.mjs'

/** @import { Point } from './curve.mjs' */

/**
 * @typedef {object} Ran what a run gave, as the page keeps it
 * @property {string[]} curve the text that was used
 * @property {Point[][]} points close ones along it, none if it was off
 */

const NODE = 'EditSlidersCalibratedStrength'
const HEIGHT = 200
const MARGIN = 10
const WIDTH = 320
const FRAMES_TO_SETTLE = 30
const STYLE = `
.es-curve { display: flex; flex-direction: column; gap: 4px; height: 100%; min-height: ${HEIGHT}px; 
  box-sizing: border-box; font: 12px sans-serif; color: var(--input-text, #ddd); }
.es-curve [hidden] { display: none; }
.es-plot { flex: 1; min-height: 0; display: flex; background: var(--comfy-input-bg, #222); border-radius: 4px; }
.es-plot svg { width: 100%; height: 100%; }
.es-plot p { margin: auto; padding: 8px; overflow-wrap: anywhere; text-align: center;
  color: var(--descrip-text, #999); }
.es-plot p.es-wrong { color: var(--error-text, #f0716b); }
.es-plot text { font: 10px sans-serif; fill: var(--descrip-text, #999); text-anchor: middle; }
.es-plot .es-left { text-anchor: end; }
.es-plot .es-now { font-size: 11px; text-anchor: end; fill: var(--input-text, #ddd); }
.es-plot polyline { fill: none; }
.es-plot line { stroke: var(--border-color, #4e4e4e); stroke-width: 0.5; }
.es-same { stroke: var(--descrip-text, #999); stroke-dasharray: 4 4; }
.es-unused .es-same { opacity: 0.5; }
.es-line { stroke: #61afef; stroke-width: 2; stroke-linejoin: round; }
.es-point { fill: #61afef; }
.es-at { stroke: var(--input-text, #ddd); stroke-width: 0.75; stroke-dasharray: 2 2; }
.es-marker { fill: var(--input-text, #ddd); stroke: var(--comfy-input-bg, #222); stroke-width: 1.5; }
.es-keep { background: #454545; color: #ddd; border: 0; border-radius: 3px; padding: 2px 7px; cursor: pointer;
  font: inherit; align-self: start; }
`

/** @type {WeakMap<LGraphNode, CurveView>} */
const views = new WeakMap()

/** @type {Map<string, string>} the text that came, by the node's place and where it came from: undo makes new nodes */
const arrived = new Map()

/** @param {LGraphNode} node */
export function showCurve(node) {
  if (node.comfyClass === NODE) views.set(node, new CurveView(node))
}

/**
 * Once another graph is shown: Nodes 2.0 may keep the element of a node that had the same id, so put ours in its place;
 * and the page says only later what the runs of that graph gave.
 * @param {LGraphNode} node
 */
export function settleCurve(node, frames = FRAMES_TO_SETTLE) {
  const view = views.get(node)
  if (!view || !frames) return
  view.settle()
  requestAnimationFrame(() => settleCurve(node, frames - 1))
}

class CurveView {
  /** @param {LGraphNode} node */
  constructor(node) {
    this.node = node
    this.plot = element('div', 'es-plot')
    this.keep = button(t('keepCurve'), t('keepCurveTip'), () => this.keepCurve())
    this.keep.className = 'es-keep'
    this.element = element('div', 'es-curve')
    this.element.append(element('style', '', { textContent: STYLE }), this.plot, this.keep)
    this.element.addEventListener('wheel', forward)
    this.drawn = ''
    const widget = /** @type {NodeWithElements} */ (node).addDOMWidget('drawing', 'EDIT_SLIDERS_CURVE', this.element, {
      serialize: false,
      getMinHeight: () => HEIGHT + 2 * MARGIN
    })
    widget.serialize = false
    this.follow()
    const [width, height] = node.computeSize()
    node.setSize([Math.max(width, WIDTH), height])
    this.refresh()
  }

  /** Draw anew whenever the node changes. */
  follow() {
    const { node } = this
    const refresh = () => this.refresh()
    for (const name of ['position', 'curve', 'on']) after(this.widget(name), 'callback', refresh)
    after(node, 'onConfigure', refresh)
    after(node, 'onConnectionsChange', refresh)
    after(node, 'onExecuted', () => {
      if (this.ran) arrived.set(this.arrival, String(this.ran.curve.at(-1)))
      this.refresh()
    })
  }

  /** @param {string} name @returns {Widget} */
  widget(name) {
    const found = this.node.widgets?.find((widget) => widget.name === name)
    if (found) return found
    throw new Error(`Calibrated Strength has no ${name}: the page and the server are of different versions.`)
  }

  /** @param {string} name @returns {number} of its input, -1 if it has none */
  slot(name) {
    return this.node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1
  }

  /** Node and output that a widget's value comes from; empty if it is the widget's own. @param {string} name */
  source(name) {
    const id = this.node.inputs?.[this.slot(name)]?.link
    const link = id == null ? undefined : this.node.graph?.getLink(id)
    return link ? `${link.origin_id}:${link.origin_slot}` : ''
  }

  /** Where the page keeps what a run gave. */
  get place() {
    const { graph, id } = this.node
    return graph && !graph.isRootGraph ? `${graph.id}:${id}` : `${id}`
  }

  /** @returns {Ran | undefined} what the last run gave */
  get ran() {
    const output = /** @type {Record<string, any>} */ (app.nodeOutputs)[this.place]
    return output?.curve ? output : undefined
  }

  get arrival() {
    return `${this.place} ${this.source('curve')}`
  }

  /** @returns {string | undefined} the text that a run uses; undefined while only a run can tell */
  get text() {
    if (!this.source('curve')) return String(this.widget('curve').value ?? '')
    const came = arrived.get(this.arrival)
    return came === this.ran?.curve.at(-1) ? came : undefined
  }

  /** @returns {number | undefined} */
  get position() {
    const { value } = this.widget('position')
    return typeof value === 'number' && Number.isFinite(value) && !this.source('position') ? value : undefined
  }

  /** The page has another graph, or another state of it. */
  settle() {
    const { node } = this
    if (node.graph?.getNodeById(node.id) !== node) return
    if (!this.element.isConnected && node.graph === app.canvas.graph)
      document.querySelector(`[data-node-id="${node.id}"] .es-curve`)?.replaceWith(this.element)
    this.refresh()
  }

  refresh() {
    const { text, position } = this
    const on = this.widget('on').value !== false || this.source('on') !== ''
    const { points, error } = parse((on && text) || '')
    const known = this.ran?.curve.at(-1) === text ? this.ran?.points.at(-1) : undefined
    const line = known?.length && points.length ? known : points
    const waits = on && text === undefined
    const drawn = JSON.stringify([line, points, position, error, waits])
    this.keep.hidden = !this.source('curve') || !text || !parse(text).points.length
    if (drawn === this.drawn) return
    this.drawn = drawn
    if (error) this.plot.replaceChildren(element('p', 'es-wrong', { textContent: error, role: 'status' }))
    else if (waits) this.plot.replaceChildren(element('p', '', { textContent: t('curveLinked') }))
    else this.plot.replaceChildren(draw({ points, line, position }))
  }

  /** The curve that came from another node becomes the node's own. */
  keepCurve() {
    const { text } = this
    if (text === undefined) return
    const widget = this.widget('curve')
    app.canvas.emitBeforeChange()
    this.node.disconnectInput(this.slot('curve'))
    widget.value = text
    widget.callback?.(text)
    app.canvas.emitAfterChange()
  }
}

/**
 * Let something follow each call of a method.
 * @param {Record<string, any>} owner
 * @param {string} name
 * @param {() => void} then
 */
function after(owner, name, then) {
  const own = owner[name]
  owner[name] = (/** @type {unknown[]} */ ...args) => {
    own?.apply(owner, args)
    then()
  }
}
