// Gives a Slider Prompt node its sliders. The values live in the node's own widgets, which are hidden.

import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { setting } from '../settings.mjs'
import { t } from '../texts.mjs'
import { below, idsOf, outputsAmong, sweepGraph, withFewerSteps } from './api_graph.mjs'
import { Film, Filmstrip, sanitised } from './filmstrip.mjs'
import { addressOf, OwnJobs, post } from './own_jobs.mjs'
import { carried, parse } from './phrases.mjs'
import { Tokens } from './tokens.mjs'
import { View } from './view.mjs'

/** @import { ApiGraph, Definitions } from './api_graph.mjs' */
/** @import { Format, Sweep } from './filmstrip.mjs' */
/** @import { Parsed, Phrase } from './phrases.mjs' */

export const NODE = 'EditSlidersSliderPrompt'
const LIMIT = 5
const NEUTRAL = 1
const NONE = -1
const HEIGHT = 220
const SIZE = /** @type {[number, number]} */ ([360, 460])
const HEIGHT_WITH_FILM = 720
const FRAMES_TO_SETTLE = 30

/** @type {ReturnType<typeof api.getNodeDefs> | undefined} what the server knows of nodes: megabytes, so once per page */
let known

/** @type {WeakMap<LGraphNode, SliderPrompt>} */
const prompts = new WeakMap()

/** @type {WeakMap<object, Map<string, Film>>} workflow that is open -> place of the node in it -> its last sweep */
const films = new WeakMap()

/** @param {LGraphNode} node @returns {SliderPrompt | undefined} the sliders of a node */
export const slidersOf = (node) => prompts.get(node)

/** @param {LGraphNode} node */
export function addSliders(node) {
  prompts.set(node, new SliderPrompt(node))
}

/**
 * Once another graph is shown: Nodes 2.0 may keep the element of a node that had the same id, so put ours in its place;
 * and the page says only later which workflow it is, so look for the sweeps of that one.
 * @param {LGraphNode} node
 */
export function settle(node, frames = FRAMES_TO_SETTLE) {
  const ours = prompts.get(node)
  if (!ours || !frames) return
  if (ours.isPlaced) {
    const { element } = ours.view
    if (!element.isConnected && node.graph === app.canvas.graph)
      document.querySelector(`[data-node-id="${node.id}"] .es-slider-prompt`)?.replaceWith(element)
    ours.changeFilm()
  }
  requestAnimationFrame(() => settle(node, frames - 1))
}

class SliderPrompt {
  /** @param {LGraphNode} node */
  constructor(node) {
    this.node = node
    this.tokens = new Tokens(api, () => this.refresh())
    this.strip = new Filmstrip({
      render: () => this.renderSweep(),
      stop: () => this.film?.stop(),
      setSweep: (sweep) => this.setSweep(sweep),
      show: (film) => this.showFrame(film),
      use: (film) => this.use(film),
      save: (film, format) => this.saveSweep(film, format),
      address: (file) => addressOf(api, file)
    })
    this.view = new View(
      {
        setText: (text) => this.setText(text),
        setStrength: (k, strength) => this.setStrengths([[k, strength]]),
        setAll: (strengths) => this.setStrengths([...strengths.entries()]),
        released: () => this.released(),
        setLive: (live) => this.setLive(live),
        wheel: (event) => forward(event)
      },
      this.strip.element
    )
    this.live = new OwnJobs(
      api,
      () => this.job(),
      {
        onPictures: (files) => files.length && (this.view.picture.src = addressOf(api, files[files.length - 1])),
        onPreview: (address) => (this.view.picture.src = address),
        onProgress: (share) => this.showProgress(share),
        onError: (message) => (this.view.failure.textContent = message)
      },
      () => setting('debounce')
    )
    this.text = this.hide('text')
    this.sliders = this.widgets.filter(({ name }) => name.startsWith('strength_')).map(({ name }) => this.hide(name))
    /** @type {Phrase[]} as shown */
    this.phrases = []
    /** @type {Phrase[]} of the last text without an error */
    this.known = []
    /** @type {Film | undefined} */
    this.shownFilm = undefined
    /** @type {Map<number, number>} slider -> strength that its widget does not have yet */
    this.unwritten = new Map()
    this.writing = false
    this.quick = false
    const { element } = this.view
    const widget = /** @type {NodeWithElements} */ (node).addDOMWidget('sliders', 'EDIT_SLIDERS_PROMPT', element, {
      serialize: false,
      getMinHeight: () => HEIGHT,
      hideOnZoom: false
    })
    widget.serialize = false
    for (const name of ['mode', 'pad_to_512', 'channel']) this.follow(this.widget(name), () => this.changed())
    for (const name of ['lowest', 'highest']) this.follow(this.widget(name), () => this.refresh())
    this.followNode()
    this.widget('lowest').value = setting('lowest')
    this.widget('highest').value = setting('highest')
    node.properties.live = setting('live')
    node.setSize(SIZE)
    this.refresh()
    requestAnimationFrame(() => settle(node))
  }

  get widgets() {
    return this.node.widgets ?? []
  }

  /** @param {string} name @returns {Widget} */
  widget(name) {
    const found = this.widgets.find((widget) => widget.name === name)
    if (!found) throw new Error(`Slider Prompt has no ${name}: the page and the server are of different versions.`)
    return found
  }

  /** @param {string} name */
  hide(name) {
    const widget = this.widget(name)
    widget.hidden = true
    widget.options.hidden = true
    this.follow(widget, () => this.changed())
    return widget
  }

  /** Act whenever something else than the sliders sets the widget. @param {Widget} widget @param {() => void} act */
  follow(widget, act) {
    const callback = widget.callback
    widget.callback = (...args) => {
      callback?.apply(widget, args)
      if (!this.writing) act()
    }
  }

  followNode() {
    const { node } = this
    const { onConfigure, onConnectionsChange, onRemoved } = node
    node.onConfigure = (...args) => {
      onConfigure?.apply(node, args)
      this.unwritten.clear()
      this.sanitise()
      this.refresh()
    }
    node.onConnectionsChange = (...args) => {
      onConnectionsChange?.apply(node, args)
      this.refresh()
    }
    node.onRemoved = (...args) => {
      onRemoved?.apply(node, args)
      this.live.stop()
    }
  }

  /** @param {string} name */
  isLinked(name) {
    return this.node.inputs?.some((input) => input.widget?.name === name && input.link != null) ?? false
  }

  /** @param {string} text */
  setText(text) {
    this.write()
    const before = this.known
    this.text.value = text
    if (!parse(text, this.mode).error) this.carry(before, this.parsed().phrases)
    this.text.callback?.(text)
  }

  /** Let strengths and the sweep stay with their words. @param {Phrase[]} before @param {Phrase[]} after */
  carry(before, after) {
    const strengths = carried(before, after, this.strengths.slice(0, before.length), NEUTRAL)
    this.sliders.forEach((slider, k) => (slider.value = strengths[k] ?? NEUTRAL))
    const sliders = carried(before, after, [...before.keys()], NONE)
    const { axes, atOnce } = this.sweep
    if (axes.every(({ slider }) => sliders[slider] === slider)) return
    const now = (/** @type {number} */ slider) => (sliders.includes(slider) ? sliders.indexOf(slider) : slider)
    const moved = axes.map((axis) => ({ ...axis, slider: now(axis.slider) }))
    this.node.properties.sweep = /** @type {any} */ ({ axes: moved, atOnce })
  }

  get strengths() {
    return this.sliders.map(({ value }, k) => this.unwritten.get(k) ?? Number(value))
  }

  /** @param {[number, number][]} strengths pairs of slider, from 0, and strength */
  setStrengths(strengths) {
    for (const [k, strength] of strengths) {
      if (!this.sliders[k] || this.isLinked(this.sliders[k].name) || !Number.isFinite(strength)) continue
      this.unwritten.set(k, Math.min(Math.max(strength, -LIMIT), LIMIT))
    }
    if (!this.view.dragging) this.write()
    this.changed()
  }

  /** Put into the node's widgets what is only shown while a slider is dragged: it is slow, so once, not every frame. */
  write() {
    const unwritten = [...this.unwritten]
    this.unwritten.clear()
    this.writing = true
    for (const [k, strength] of unwritten) {
      this.sliders[k].value = strength
      this.sliders[k].callback?.(strength)
    }
    this.writing = false
  }

  /** Whatever a file holds, the widgets hold strengths. */
  sanitise() {
    if (typeof this.text.value !== 'string') this.text.value = ''
    for (const slider of this.sliders) slider.value = bounded(slider.value, NEUTRAL)
    const [lowest, highest] = [this.widget('lowest'), this.widget('highest')]
    lowest.value = bounded(lowest.value, -0.5)
    highest.value = bounded(highest.value, 2)
    if (lowest.value >= highest.value) [lowest.value, highest.value] = [-0.5, 2]
  }

  /** @returns {Parsed} */
  parsed() {
    const { phrases, error } = parse(String(this.text.value), this.mode)
    const most = this.sliders.length
    if (phrases.length <= most) return { phrases, error }
    return { phrases: phrases.slice(0, most), error: t('tooMany', phrases.length, most) }
  }

  get mode() {
    return String(this.widget('mode').value)
  }

  /** With a linked prompt nobody knows its words here: as many rows as strengths that say something. */
  shown() {
    if (!this.isLinked('text')) return this.parsed()
    const used = this.sliders.findLastIndex(({ name, value }) => value !== 1 || this.isLinked(name)) + 1
    const count = Math.max(used, 4)
    return { phrases: Array.from({ length: count }, (_, k) => ({ start: 0, end: 0, text: `${k + 1}` })), error: '' }
  }

  refresh() {
    const text = String(this.text.value)
    const textLinked = this.isLinked('text')
    const parsed = this.shown()
    const answered = !textLinked && !parsed.error
    if (answered) this.tokens.of(text, this.mode)
    this.phrases = parsed.phrases
    if (answered) this.known = parsed.phrases
    const count = parsed.phrases.length
    this.view.show({
      text,
      textLinked,
      parsed,
      strengths: this.strengths.slice(0, count),
      linked: this.sliders.slice(0, count).map(({ name }) => this.isLinked(name)),
      lowest: Number(this.widget('lowest').value),
      highest: Number(this.widget('highest').value),
      live: this.isLive,
      error: answered ? this.tokens.error : '',
      tokens: answered ? this.tokens.phrases : []
    })
    this.showStrip()
  }

  changed() {
    this.quick ||= this.view.dragging && setting('dragSteps') > 0
    if (this.isLive) this.live.changed()
    this.refresh()
  }

  /** What was run with fewer steps while a slider was dragged is run in full. */
  released() {
    this.write()
    this.refresh()
    if (!this.quick) return
    this.quick = false
    if (this.isLive) this.live.changed()
  }

  /** @param {number} share */
  showProgress(share) {
    this.view.progress.style.width = share < 1 ? `${100 * share}%` : '0'
  }

  get isLive() {
    return this.node.properties.live === true
  }

  /** @param {boolean} live */
  setLive(live) {
    this.node.properties.live = live
    if (live) this.live.changed()
    else this.live.stop()
    this.refresh()
  }

  /** The graph as it is now, down to the outputs that depend on this node. */
  async job() {
    this.write()
    const { graph, workflow, definitions } = await queueable()
    const dependent = below(graph, queuedAs(graph, this.node))
    const targets = outputsAmong(graph, dependent, definitions)
    if (!targets.length) throw new Error(t('nothingToRun'))
    const prompt = this.quick ? withFewerSteps(graph, dependent, definitions, setting('dragSteps')) : graph
    return { prompt, partial_execution_targets: targets, extra_data: { extra_pnginfo: { workflow } } }
  }

  // --- sweeps

  /** Where the page keeps this node's sweep: undo and switching tabs make new nodes in the same places. */
  get films() {
    const workflow = app.extensionManager.workflow.activeWorkflow ?? app
    if (!films.has(workflow)) films.set(workflow, new Map())
    return /** @type {Map<string, Film>} */ (films.get(workflow))
  }

  get place() {
    const { graph, id } = this.node
    return graph && !graph.isRootGraph ? `${graph.id}:${id}` : `${id}`
  }

  /** Not so before a node is put into a graph, and after another has taken its place there. */
  get isPlaced() {
    return this.node.graph?.getNodeById(this.node.id) === this.node
  }

  get film() {
    return this.isPlaced ? this.films.get(this.place) : undefined
  }

  get sweep() {
    return sanitised(this.node.properties.sweep)
  }

  /** @param {Sweep} sweep */
  setSweep(sweep) {
    this.node.properties.sweep = /** @type {any} */ (sweep)
    this.refresh()
  }

  showStrip() {
    this.strip.show({ sweep: this.sweep, words: this.phrases.map(({ text }) => text), film: this.shownFilm })
  }

  /** Show the sweep of this place in this workflow, if it is another one than is shown. */
  changeFilm() {
    const { film } = this
    if (film === this.shownFilm) return
    if (this.shownFilm) this.view.clear()
    this.shownFilm = film
    if (film) {
      film.changed = () => this.film === film && this.showFilm(film)
      this.showFilm(film)
    } else this.showStrip()
  }

  /** A sweep that has come or gone on. @param {Film} film */
  showFilm(film) {
    if (film.error) this.view.failure.textContent = film.error
    this.showProgress(film.progress)
    this.showFrame(film)
  }

  /** @param {Film} film */
  showFrame(film) {
    const file = film.files[film.shown]
    if (file) this.view.picture.src = addressOf(api, file)
    this.showStrip()
  }

  /** Set the sliders of the swept words, wherever they stand now, to the strengths of the shown frame. @param {Film} film */
  use(film) {
    const sliders = film.axes.map(({ slider }, k) =>
      this.phrases[slider]?.text === film.words[k] ? slider : this.phrases.findIndex(({ text }) => text === film.words[k])
    )
    this.setStrengths(sliders.map((slider, k) => [slider, film.strengths[film.shown][k]]))
  }

  renderSweep() {
    const { axes, atOnce } = this.sweep
    const wrong = axes.map(({ slider }) => this.whyNot(slider)).find(Boolean)
    if (wrong) {
      this.view.failure.textContent = wrong
      return
    }
    this.film?.stop()
    const film = new Film(
      axes,
      axes.map(({ slider }) => this.phrases[slider].text)
    )
    this.view.clear()
    this.films.set(this.place, film)
    if (this.node.size[1] < HEIGHT_WITH_FILM) this.node.setSize([this.node.size[0], HEIGHT_WITH_FILM])
    render(film, this.node, atOnce)
    this.changeFilm()
    this.refresh()
  }

  /** Why a slider cannot be swept. @param {number} slider */
  whyNot(slider) {
    if (slider >= this.phrases.length) return t('noSuchSlider', slider + 1, this.phrases.length)
    return this.isLinked(this.sliders[slider].name) ? t('sliderLinked', slider + 1) : ''
  }

  /** @param {Film} film @param {Format} format */
  async saveSweep(film, format) {
    const { files: frames, columns, heading, metadata } = film
    const captions = frames.map((_, k) => film.caption(k))
    const wanted = { format, frames, captions, columns, heading, metadata }
    const file = await post(api, '/edit_sliders/sweep_file', wanted).catch((error) => {
      this.view.failure.textContent = error.message
    })
    if (!file) return
    const link = document.createElement('a')
    link.href = URL.createObjectURL(await file.blob())
    link.download = format === 'webp' ? 'sweep.webp' : `sweep_${format}.png`
    link.click()
    URL.revokeObjectURL(link.href)
  }
}

/**
 * Have the pictures of a sweep made, as one job.
 * @param {Film} film
 * @param {LGraphNode} node the Slider Prompt
 * @param {number} atOnce
 */
function render(film, node, atOnce) {
  /** @type {string[]} */
  let batches = []
  const jobs = new OwnJobs(
    api,
    async () => {
      const { graph, workflow, definitions } = await queueable()
      const swept = sweepGraph(graph, queuedAs(graph, node)[0], definitions, film.axes, atOnce)
      if (!swept) throw new Error(t('nothingToRun'))
      batches = swept.targets
      film.metadata = { workflow: JSON.stringify(workflow), prompt: JSON.stringify(graph) }
      const { graph: prompt, targets: partial_execution_targets } = swept
      return { prompt, partial_execution_targets, extra_data: { extra_pnginfo: { workflow } } }
    },
    {
      onPictures: (files, source) => {
        const first = batches.indexOf(source) * atOnce
        if (first < 0) return
        const wanted = Math.min(atOnce, film.files.length - first)
        if (files.length !== wanted) film.error = t('otherPictures', files.length, wanted)
        else files.forEach((file, k) => (film.files[first + k] = file))
        if (!film.files[film.shown]) film.shown = first
        film.changed()
      },
      onPreview: () => {},
      onProgress: (share) => {
        const done = film.files.filter(Boolean).length / film.files.length
        film.progress = share < 1 ? Math.min(done + (share * atOnce) / film.files.length, 0.99) : 1
        film.changed()
      },
      onError: (message) => {
        film.error = message
        film.changed()
      }
    }
  )
  film.stop = () => jobs.stop()
  jobs.start()
}

/** The graph of the page as it is queued, and what is known of its nodes. */
async function queueable() {
  known ??= api.getNodeDefs()
  const [{ output, workflow }, definitions] = await Promise.all([app.graphToPrompt(), known]).catch(error => {
    known = undefined
    throw error
  })
  return {
    graph: /** @type {ApiGraph} */ (output),
    workflow,
    definitions: /** @type {Definitions} */ (/** @type {unknown} */ (definitions))
  }
}

/** @param {ApiGraph} graph @param {LGraphNode} node a Slider Prompt */
function queuedAs(graph, node) {
  const ids = idsOf(graph, node.id, !node.graph?.isRootGraph).filter((id) => graph[id].class_type === NODE)
  if (!ids.length) throw new Error(t('notQueued'))
  return ids
}

/** Forget the sweeps of a workflow that was cleared: new nodes take the places of the old ones. */
export function forgetFilms() {
  const kept = films.get(app.extensionManager.workflow.activeWorkflow ?? app)
  for (const film of kept?.values() ?? []) film.stop()
  kept?.clear()
}

/** @param {unknown} value @param {number} usual */
function bounded(value, usual) {
  return typeof value === 'number' && Number.isFinite(value) ? Math.min(Math.max(value, -LIMIT), LIMIT) : usual
}

/** On the canvas the wheel over a node zooms; Nodes 2.0 sees to that itself. @param {WheelEvent} event */
export function forward(event) {
  if (!app.extensionManager.setting.get('Comfy.VueNodes.Enabled')) app.canvas.processMouseWheel(event)
}
