// Gives the Slider Prompt node its sliders. The values live in the node's own widgets, which are hidden.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { carried, parse } from './slider_prompt/phrases.mjs'
import { LiveQueue, listen } from './slider_prompt/live.mjs'
import { View } from './slider_prompt/view.mjs'

const NODE = 'EditSlidersSliderPrompt'
const LIMIT = 100
const HEIGHT = 220
const SIZE = [360, 440]

app.registerExtension({
  name: 'EditSliders.SliderPrompt',

  setup() {
    listen(api)
  },

  nodeCreated(node) {
    if (node.comfyClass === NODE) new SliderPrompt(node)
  },

  afterConfigureGraph() {
    for (const node of app.graph.nodes) if (node.comfyClass === NODE) reattach(node)
  }
})

class SliderPrompt {
  constructor(node) {
    this.node = node
    this.view = new View({
      setText: (text) => this.setText(text),
      setStrength: (k, strength) => this.setStrengths([[k, strength]]),
      setAll: (strengths) => this.setStrengths([...strengths.entries()]),
      setLive: (live) => this.setLive(live)
    })
    this.queue = new LiveQueue(api, () => this.job(), {
      onPicture: (picture) => (this.view.picture.src = picture),
      onProgress: (share) => (this.view.progress.style.width = share < 1 ? `${100 * share}%` : '0'),
      onError: (message) => (this.view.failure.textContent = message)
    })
    this.text = this.hide('text')
    this.sliders = node.widgets.filter(({ name }) => name.startsWith('strength_')).map(({ name }) => this.hide(name))
    this.phrases = []
    this.writing = false
    const widget = node.addDOMWidget('sliders', 'EDIT_SLIDERS_PROMPT', this.view.element, {
      serialize: false,
      getMinHeight: () => HEIGHT,
      hideOnZoom: false
    })
    widget.serialize = false
    node.editSliders = this
    for (const name of ['mode', 'lowest', 'highest']) this.follow(this.widget(name))
    const configured = node.onConfigure
    node.onConfigure = (...args) => {
      configured?.apply(node, args)
      this.sanitise()
      this.refresh()
    }
    const connected = node.onConnectionsChange
    node.onConnectionsChange = (...args) => {
      connected?.apply(node, args)
      this.refresh()
    }
    const removed = node.onRemoved
    node.onRemoved = (...args) => {
      removed?.apply(node, args)
      this.queue.stop()
    }
    node.setSize(SIZE)
    this.refresh()
    requestAnimationFrame(() => reattach(node))
  }

  widget(name) {
    return this.node.widgets.find((widget) => widget.name === name)
  }

  hide(name) {
    const widget = this.widget(name)
    widget.hidden = true
    widget.options.hidden = true
    this.follow(widget)
    return widget
  }

  /** Show what the widget holds whenever someone else sets it. */
  follow(widget) {
    const callback = widget.callback
    widget.callback = (...args) => {
      callback?.apply(widget, args)
      if (!this.writing) this.refresh()
    }
  }

  isLinked(name) {
    return this.node.inputs?.some((input) => input.widget?.name === name && input.link != null) ?? false
  }

  setText(text) {
    const before = this.phrases
    this.text.value = text
    const after = this.parsed().phrases
    const moved = carried(before, after, this.sliders.slice(0, before.length).map(({ value }) => value))
    this.sliders.forEach((slider, k) => (slider.value = moved[k] ?? 1))
    this.text.callback?.(text)
    this.changed()
  }

  setStrengths(strengths) {
    this.writing = true
    for (const [k, strength] of strengths) {
      if (this.isLinked(this.sliders[k].name)) continue
      this.sliders[k].value = Math.min(Math.max(strength, -LIMIT), LIMIT)
      this.sliders[k].callback?.(this.sliders[k].value)
    }
    this.writing = false
    this.changed()
  }

  /** Whatever a file holds, the widgets hold strengths. */
  sanitise() {
    if (typeof this.text.value !== 'string') this.text.value = ''
    for (const slider of this.sliders) {
      const value = typeof slider.value === 'number' ? slider.value : NaN
      slider.value = Number.isFinite(value) ? Math.min(Math.max(value, -LIMIT), LIMIT) : 1
    }
  }

  parsed() {
    const { phrases, error } = parse(this.text.value, this.widget('mode').value)
    const most = this.sliders.length
    if (phrases.length <= most) return { phrases, error }
    return { phrases: phrases.slice(0, most), error: `There are ${phrases.length} sub-instructions; sliders: ${most}.` }
  }

  /** With a linked prompt nobody knows its words here: as many rows as strengths that say something. */
  shown() {
    if (!this.isLinked('text')) return this.parsed()
    const used = this.sliders.findLastIndex(({ name, value }) => value !== 1 || this.isLinked(name)) + 1
    const count = Math.max(used, 4)
    return { phrases: Array.from({ length: count }, (_, k) => ({ start: 0, end: 0, text: `${k + 1}` })), error: '' }
  }

  refresh() {
    const parsed = this.shown()
    this.phrases = parsed.phrases
    const sliders = this.sliders.slice(0, parsed.phrases.length)
    this.view.show({
      text: this.text.value,
      textLinked: this.isLinked('text'),
      parsed,
      strengths: sliders.map(({ value }) => value),
      linked: sliders.map(({ name }) => this.isLinked(name)),
      lowest: this.widget('lowest').value,
      highest: this.widget('highest').value,
      live: this.live
    })
  }

  get live() {
    return this.node.properties.live === true
  }

  setLive(live) {
    this.node.properties.live = live
    if (live) this.queue.changed()
    else this.queue.stop()
    this.refresh()
  }

  /** The graph as it is now, down to the outputs that depend on this node. */
  async job() {
    const { output, workflow } = await app.graphToPrompt()
    const defs = await api.getNodeDefs()
    const targets = below(output, this.node).filter((id) => defs[output[id].class_type]?.output_node)
    if (!targets.length) {
      this.view.failure.textContent = 'Nothing to run: no picture is saved or previewed below this node.'
      return
    }
    return { prompt: output, partial_execution_targets: targets, extra_data: { extra_pnginfo: { workflow } } }
  }

  changed() {
    if (this.live) this.queue.changed()
    this.refresh()
    this.node.graph?.setDirtyCanvas(true, true)
  }
}

/** Ids of the nodes of an API graph that depend on a node, which may lie in a subgraph. */
function below(graph, node) {
  const found = Object.keys(graph).filter((id) => id === `${node.id}` || id.endsWith(`:${node.id}`))
  for (const id of found) {
    for (const [other, { inputs }] of Object.entries(graph)) {
      const depends = Object.values(inputs).some((value) => Array.isArray(value) && value[0] === id)
      if (depends && !found.includes(other)) found.push(other)
    }
  }
  return found
}

/** Nodes 2.0 keeps the old element in the page when a graph is loaded over one: put ours in its place. */
function reattach(node, frames = 30) {
  const ours = node.editSliders?.view.element
  if (!ours || ours.isConnected || !frames) return
  const stale = document.querySelector(`[data-node-id="${node.id}"] .es-slider-prompt`)
  if (stale) stale.replaceWith(ours)
  else requestAnimationFrame(() => reattach(node, frames - 1))
}
