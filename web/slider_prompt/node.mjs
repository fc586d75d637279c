// The sliders of a Slider Prompt node. Their values are in the node's own widgets, which are hidden.

import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { descendants, limitSteps, outputNodes } from '../shared/api_graph.mjs'
import { forwardWheel, isInGraph, reattachElement, updateAfterGraphChange } from '../shared/dom_widget.mjs'
import { LatestJobRunner, viewUrl } from '../shared/job_runner.mjs'
import { setting } from '../shared/settings.mjs'
import { t } from '../shared/texts.mjs'
import { parse, preserveValues } from './phrases.mjs'
import { queuedGraph, sliderPromptIds } from './queued_graph.mjs'
import { SweepPanel } from './sweep.mjs'
import { TokenPreview } from './tokens.mjs'
import { View } from './view.mjs'

/** @import { Parsed, Phrase } from './phrases.mjs' */

const MAX_SLIDER_VALUE = 5
const DEFAULT_STRENGTH = 1
const [DEFAULT_LOWEST, DEFAULT_HIGHEST] = [-0.5, 2]
const MIN_SLIDERS_WITH_LINKED_PROMPT = 4
const NONE = -1
const MIN_HEIGHT = 220
const NODE_SIZE = /** @type {[number, number]} */ ([360, 460])

/** @type {WeakMap<LGraphNode, SliderPrompt>} */
const sliderPrompts = new WeakMap()

/** @param {LGraphNode} node @returns {SliderPrompt | undefined} undefined for nodes of other types */
export const slidersOf = (node) => sliderPrompts.get(node)

/** Add the sliders to a new Slider Prompt. @param {LGraphNode} node */
export function addSliders(node) {
  sliderPrompts.set(node, new SliderPrompt(node))
}

/** Update a Slider Prompt after the page has changed to another graph. @param {LGraphNode} node of any type */
export function reattachSliders(node) {
  const sliders = slidersOf(node)
  if (sliders) updateAfterGraphChange(() => sliders.reattach())
}

class SliderPrompt {
  /** @param {LGraphNode} node */
  constructor(node) {
    this.node = node
    this.tokens = new TokenPreview(api, () => this.refresh())
    this.sweepPanel = new SweepPanel(this)
    /** @type {View} */
    this.view = new View(
      {
        setText: (text) => this.setText(text),
        setStrength: (k, strength) => this.setStrengths([[k, strength]]),
        setAllStrengths: (strengths) => this.setStrengths([...strengths.entries()]),
        endDrag: () => this.endDrag(),
        setLive: (live) => this.setLive(live),
        wheel: (event) => forwardWheel(event)
      },
      this.sweepPanel.filmstrip.element
    )
    this.liveJobs = new LatestJobRunner(
      api,
      () => this.createLiveRequest(),
      {
        onImages: (files) => files.length && (this.view.image.src = viewUrl(api, files[files.length - 1])),
        onPreview: (url) => (this.view.image.src = url),
        onProgress: (fraction) => this.showProgress(fraction),
        onError: (message) => (this.view.runError.textContent = message)
      },
      () => setting('debounce')
    )
    this.textWidget = this.hideWidget('text')
    this.strengthWidgets = this.widgets
      .filter(({ name }) => name.startsWith('strength_'))
      .map(({ name }) => this.hideWidget(name))
    /** @type {Phrase[]} one per visible slider */
    this.phrases = []
    /** @type {Phrase[]} of the last prompt without an error */
    this.lastValidPhrases = []
    /** @type {Map<number, number>} slider index -> strength that is not yet in its widget */
    this.pendingValues = new Map()
    this.writing = false
    /** Whether runs are limited to the setting dragSteps since a slider was dragged. */
    this.reducedSteps = false
    const { element } = this.view
    const widget = /** @type {NodeWithDOMWidgets} */ (node).addDOMWidget('sliders', 'EDIT_SLIDERS_PROMPT', element, {
      serialize: false,
      getMinHeight: () => MIN_HEIGHT,
      hideOnZoom: false
    })
    widget.serialize = false
    for (const name of ['mode', 'pad_to_512', 'channel']) this.onWidgetChange(this.widget(name), () => this.onChange())
    for (const name of ['lowest', 'highest']) this.onWidgetChange(this.widget(name), () => this.refresh())
    this.extendNodeCallbacks()
    this.widget('lowest').value = setting('lowest')
    this.widget('highest').value = setting('highest')
    node.properties.live = setting('live')
    node.setSize(NODE_SIZE)
    this.refresh()
    requestAnimationFrame(() => reattachSliders(node))
  }

  get widgets() {
    return this.node.widgets ?? []
  }

  /** @param {string} name @returns {Widget} */
  widget(name) {
    const widget = this.widgets.find((widget) => widget.name === name)
    if (!widget) throw new Error(`Slider Prompt has no widget '${name}': reload the page after updating Edit Sliders.`)
    return widget
  }

  /** Hide a widget that the view replaces. @param {string} name */
  hideWidget(name) {
    const widget = this.widget(name)
    widget.hidden = true
    widget.options.hidden = true
    this.onWidgetChange(widget, () => this.onChange())
    return widget
  }

  /** Call `act` whenever anything but the sliders sets the widget. @param {Widget} widget @param {() => void} act */
  onWidgetChange(widget, act) {
    const { callback } = widget
    widget.callback = (...args) => {
      callback?.apply(widget, args)
      if (!this.writing) act()
    }
  }

  extendNodeCallbacks() {
    const { node } = this
    const { onConfigure, onConnectionsChange, onRemoved } = node
    node.onConfigure = (...args) => {
      onConfigure?.apply(node, args)
      this.pendingValues.clear()
      this.sanitizeWidgets()
      this.refresh()
    }
    node.onConnectionsChange = (...args) => {
      onConnectionsChange?.apply(node, args)
      this.refresh()
    }
    node.onRemoved = (...args) => {
      onRemoved?.apply(node, args)
      this.liveJobs.stop()
    }
  }

  /** Whether an input is linked. @param {string} name */
  isLinked(name) {
    return this.node.inputs?.some((input) => input.widget?.name === name && input.link != null) ?? false
  }

  /** @param {number} slider */
  isStrengthLinked(slider) {
    return this.isLinked(this.strengthWidgets[slider].name)
  }

  /** @param {string} text */
  setText(text) {
    this.writePendingValues()
    const before = this.lastValidPhrases
    this.textWidget.value = text
    if (!parse(text, this.mode).error) this.preserveStrengths(before, this.parsed().phrases)
    this.textWidget.callback?.(text)
  }

  /** Keep the strengths and the sweep of each phrase after an edit. @param {Phrase[]} before @param {Phrase[]} after */
  preserveStrengths(before, after) {
    const strengths = preserveValues(before, after, this.strengths.slice(0, before.length), DEFAULT_STRENGTH)
    this.strengthWidgets.forEach((widget, k) => (widget.value = strengths[k] ?? DEFAULT_STRENGTH))
    const previousSliders = preserveValues(before, after, [...before.keys()], NONE)
    const { axes, batchSize } = this.sweepPanel.sweep
    if (axes.every(({ slider }) => previousSliders[slider] === slider)) return
    const newSlider = (/** @type {number} */ slider) =>
      previousSliders.includes(slider) ? previousSliders.indexOf(slider) : slider
    this.sweepPanel.sweep = { axes: axes.map((axis) => ({ ...axis, slider: newSlider(axis.slider) })), batchSize }
  }

  get strengths() {
    return this.strengthWidgets.map(({ value }, k) => this.pendingValues.get(k) ?? Number(value))
  }

  /** @param {[number, number][]} strengths pairs of slider index and strength */
  setStrengths(strengths) {
    for (const [k, strength] of strengths) {
      if (!this.strengthWidgets[k] || this.isStrengthLinked(k) || !Number.isFinite(strength)) continue
      this.pendingValues.set(k, clampStrength(strength))
    }
    if (!this.view.dragging) this.writePendingValues()
    this.onChange()
  }

  /** Write the pending strengths to their widgets: not during a drag, since it is too slow for every frame. */
  writePendingValues() {
    const pending = [...this.pendingValues]
    this.pendingValues.clear()
    this.writing = true
    for (const [k, strength] of pending) {
      this.strengthWidgets[k].value = strength
      this.strengthWidgets[k].callback?.(strength)
    }
    this.writing = false
  }

  /** Replace invalid values of a loaded workflow. */
  sanitizeWidgets() {
    if (typeof this.textWidget.value !== 'string') this.textWidget.value = ''
    for (const widget of this.strengthWidgets) widget.value = validStrength(widget.value, DEFAULT_STRENGTH)
    const [lowest, highest] = [this.widget('lowest'), this.widget('highest')]
    lowest.value = validStrength(lowest.value, DEFAULT_LOWEST)
    highest.value = validStrength(highest.value, DEFAULT_HIGHEST)
    if (lowest.value >= highest.value) [lowest.value, highest.value] = [DEFAULT_LOWEST, DEFAULT_HIGHEST]
  }

  /** The phrases of the prompt, at most one per strength widget. @returns {Parsed} */
  parsed() {
    const { phrases, error } = parse(String(this.textWidget.value), this.mode)
    const maxSliders = this.strengthWidgets.length
    if (phrases.length <= maxSliders) return { phrases, error }
    return { phrases: phrases.slice(0, maxSliders), error: t('tooManyInstructions', phrases.length, maxSliders) }
  }

  get mode() {
    return String(this.widget('mode').value)
  }

  /**
   * The phrases to show. The page does not know a linked prompt: then they are numbers, up to the last strength that is
   * linked or not 1.
   * @returns {Parsed}
   */
  visiblePhrases() {
    if (!this.isLinked('text')) return this.parsed()
    const used = this.strengthWidgets.findLastIndex(({ value }, k) => value !== 1 || this.isStrengthLinked(k)) + 1
    const length = Math.max(used, MIN_SLIDERS_WITH_LINKED_PROMPT)
    return { phrases: Array.from({ length }, (_, k) => ({ start: 0, end: 0, text: `${k + 1}` })), error: '' }
  }

  /** Show the current state of the node. */
  refresh() {
    const text = String(this.textWidget.value)
    const textLinked = this.isLinked('text')
    const parsed = this.visiblePhrases()
    const valid = !textLinked && !parsed.error
    if (valid) this.tokens.request(text, this.mode)
    this.phrases = parsed.phrases
    if (valid) this.lastValidPhrases = parsed.phrases
    this.view.show({
      text,
      textLinked,
      parsed,
      strengths: this.strengths.slice(0, parsed.phrases.length),
      strengthLinked: parsed.phrases.map((_, k) => this.isStrengthLinked(k)),
      lowest: Number(this.widget('lowest').value),
      highest: Number(this.widget('highest').value),
      live: this.isLive,
      error: valid ? this.tokens.error : '',
      tokens: valid ? this.tokens.phrases : []
    })
    this.sweepPanel.refresh()
  }

  /** Show a change, and schedule a run in live mode. */
  onChange() {
    this.reducedSteps ||= this.view.dragging && setting('dragSteps') > 0
    if (this.isLive) this.liveJobs.schedule()
    this.refresh()
  }

  /** Write the dragged strengths, and repeat with all steps what was run with fewer. */
  endDrag() {
    this.writePendingValues()
    this.refresh()
    if (!this.reducedSteps) return
    this.reducedSteps = false
    if (this.isLive) this.liveJobs.schedule()
  }

  /** @param {number} fraction 0 to 1; 1 hides the progress bar */
  showProgress(fraction) {
    this.view.progress.style.width = fraction < 1 ? `${100 * fraction}%` : '0'
  }

  get isLive() {
    return this.node.properties.live === true
  }

  /** @param {boolean} live */
  setLive(live) {
    this.node.properties.live = live
    if (live) this.liveJobs.schedule()
    else this.liveJobs.stop()
    this.refresh()
  }

  /** The request that runs the current graph up to the output nodes that depend on this node. */
  async createLiveRequest() {
    this.writePendingValues()
    const { graph, workflow, definitions } = await queuedGraph()
    const dependent = descendants(graph, sliderPromptIds(graph, this.node))
    const targets = outputNodes(graph, dependent, definitions)
    if (!targets.length) throw new Error(t('nothingToRun'))
    const prompt = this.reducedSteps ? limitSteps(graph, dependent, definitions, setting('dragSteps')) : graph
    return { prompt, partial_execution_targets: targets, extra_data: { extra_pnginfo: { workflow } } }
  }

  /** Put the view back into the node, and show the node's sweep in the active workflow. */
  reattach() {
    if (!isInGraph(this.node)) return
    reattachElement(this.node, this.view.element)
    this.sweepPanel.update()
  }
}

/** @param {number} strength */
const clampStrength = (strength) => Math.min(Math.max(strength, -MAX_SLIDER_VALUE), MAX_SLIDER_VALUE)

/** @param {unknown} value @param {number} defaultValue used if the value is not a number */
function validStrength(value, defaultValue) {
  return typeof value === 'number' && Number.isFinite(value) ? clampStrength(value) : defaultValue
}
