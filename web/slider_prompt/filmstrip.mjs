// The filmstrip under the sliders: the form of a sweep and its images, one of which is selected by dragging or by keys.
// Independent of nodes.

/** @import { Axis } from '../shared/api_graph.mjs' */
/** @import { ImageFile } from '../shared/job_runner.mjs' */

import { sweepStrengths } from '../shared/api_graph.mjs'
import { button, element } from '../shared/elements.mjs'
import { t } from '../shared/texts.mjs'

/**
 * @typedef {{ axes: Axis[], batchSize: number }} Sweep one axis, or two for a grid
 * @typedef {'webp' | 'strip' | 'grid'} Format
 *
 * @typedef {object} Actions called on user input
 * @property {() => void} render
 * @property {() => void} stop
 * @property {(sweep: Sweep) => void} setSweep
 * @property {(result: SweepResult) => void} select another image was selected
 * @property {(result: SweepResult) => void} applyStrengths set the sliders to the strengths of the selected image
 * @property {(result: SweepResult, format: Format) => void} save
 * @property {(file: ImageFile) => string} imageUrl
 *
 * @typedef {object} State what the filmstrip shows
 * @property {Sweep} sweep in the form
 * @property {string[]} phrases one per slider
 * @property {SweepResult | undefined} result
 */

const MAX_SLIDERS = 50
const MAX_COUNT = 32
const MAX_STRENGTH = 100
const NONE = -1
/** @type {Axis} */
const DEFAULT_AXIS = { slider: 0, from: 0, to: 1.5, count: 7 }
/** @type {Axis} */
const DEFAULT_SECOND_AXIS = { slider: 1, from: 0, to: 1.5, count: 4 }
const DEFAULT_BATCH_SIZE = 4

/** The images of a sweep, some of them perhaps not rendered yet. They outlive the node that has rendered them. */
export class SweepResult {
  /**
   * @param {Axis[]} axes
   * @param {string[]} phrases one per axis
   */
  constructor(axes, phrases) {
    this.axes = axes
    this.phrases = phrases
    this.strengths = sweepStrengths(axes)
    /** @type {(ImageFile | undefined)[]} in the order of `strengths` */
    this.files = this.strengths.map(() => undefined)
    /** Index of the selected image. */
    this.selected = 0
    /** @type {Record<string, string>} for saved files, as ComfyUI writes it to images: prompt and workflow as JSON */
    this.metadata = {}
    this.error = ''
    /** 0 to 1; 1 when rendering has ended */
    this.progress = 0
    /** Cancels the rendering. */
    this.stop = () => {}
    /** Called after each change, for the view that shows this result. */
    this.onChange = () => {}
  }

  get columns() {
    return this.axes[0].count
  }

  get complete() {
    return this.files.every(Boolean)
  }

  get heading() {
    return this.phrases.join(' / ')
  }

  /** The strengths of image k. @param {number} k */
  caption(k) {
    return this.strengths[k].map((strength) => String(Math.round(strength * 100) / 100)).join(' / ')
  }
}

/**
 * A sweep from its saved form, with defaults in place of missing and invalid values.
 * @param {unknown} saved { axes, atOnce }
 * @returns {Sweep}
 */
export function readSweep(saved) {
  const { axes: savedAxes, atOnce } = /** @type {{ axes?: unknown, atOnce?: unknown }} */ (saved ?? {})
  const [first, second] = Array.isArray(savedAxes) ? savedAxes : []
  const axes = [readAxis(first, DEFAULT_AXIS), ...(second ? [readAxis(second, DEFAULT_SECOND_AXIS)] : [])]
  if (axes[1]?.slider === axes[0].slider) axes.pop()
  return { axes, batchSize: readInteger(atOnce, DEFAULT_BATCH_SIZE, 1, MAX_COUNT ** 2) }
}

/** @param {Partial<Axis> | undefined} saved @param {Axis} defaults @returns {Axis} */
function readAxis(saved, defaults) {
  return {
    slider: readInteger(saved?.slider, defaults.slider, 0, MAX_SLIDERS - 1),
    from: readStrength(saved?.from, defaults.from),
    to: readStrength(saved?.to, defaults.to),
    count: readInteger(saved?.count, defaults.count, 1, MAX_COUNT)
  }
}

/** @param {unknown} value @param {number} defaultValue */
function readStrength(value, defaultValue) {
  if (typeof value !== 'number' || !Number.isFinite(value)) return defaultValue
  return Math.min(Math.max(value, -MAX_STRENGTH), MAX_STRENGTH)
}

/** @param {unknown} value @param {number} defaultValue @param {number} min @param {number} max */
function readInteger(value, defaultValue, min, max) {
  return Number.isInteger(value) ? Math.min(Math.max(Number(value), min), max) : defaultValue
}

export class Filmstrip {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions
    /** @type {State | undefined} */
    this.state = undefined
    this.shownFrames = ''
    this.dragging = false
    this.element = element('div', 'es-filmstrip')
    this.runButton = button('', t('sweepTip'), () => (this.isRunning ? this.actions.stop() : this.actions.render()))
    this.runButton.classList.add('es-sweep')
    this.summary = element('summary')
    this.axisFields = [this.createAxisFields('sweepSlider', false), this.createAxisFields('secondSlider', true)]
    this.batchSize = element('input', '', { type: 'number', min: '1', step: '1' })
    this.frames = element('div', 'es-frames', { tabIndex: 0 })
    this.frames.setAttribute('role', 'listbox')
    this.scrub = element('input', 'es-scrub', { type: 'range', min: '0', step: '1', ariaLabel: t('scrub') })
    this.format = element('select', '', { ariaLabel: t('saveAs') })
    for (const format of ['webp', 'strip', 'grid'])
      this.format.append(element('option', '', { value: format, textContent: t(`format_${format}`) }))
    this.caption = element('span', 'es-caption')
    this.saveButton = button(t('save'), t('saveTip'), () =>
      this.withResult((result) => this.actions.save(result, /** @type {Format} */ (this.format.value)))
    )
    this.tools = element('div', 'es-bar')
    this.assemble()
  }

  assemble() {
    const settings = element('details')
    const batchSize = element('label', '', { textContent: `${t('batchSize')} `, title: t('batchSizeTip') })
    batchSize.append(this.batchSize)
    settings.append(this.summary, ...this.axisFields.map(({ row }) => row), batchSize)
    const head = element('div', 'es-filmstrip-head')
    head.append(this.runButton, settings)
    this.tools.append(
      this.caption,
      button(t('applyStrength'), t('applyStrengthTip'), () => this.withResult(this.actions.applyStrengths)),
      this.format,
      this.saveButton
    )
    this.element.append(head, this.frames, this.scrub, this.tools)
    this.batchSize.addEventListener('change', () => this.readForm())
    this.scrub.addEventListener('input', () => this.select(Number(this.scrub.value)))
    this.frames.addEventListener('pointerdown', (event) => {
      this.dragging = true
      this.frames.setPointerCapture(event.pointerId)
      this.select(this.frameAt(event))
    })
    this.frames.addEventListener('pointermove', (event) => this.dragging && this.select(this.frameAt(event)))
    for (const end of ['pointerup', 'pointercancel'])
      this.frames.addEventListener(end, () => (this.dragging = false))
    this.frames.addEventListener('keydown', (event) => this.onKey(event))
  }

  /** One line of the form. @param {string} label key of its text @param {boolean} optional */
  createAxisFields(label, optional) {
    const row = element('div', 'es-axis')
    const slider = element('select', '', { ariaLabel: t(label) })
    const [from, to, count] = ['from', 'to', 'count'].map((name) => {
      const step = name === 'count' ? '1' : '0.05'
      return element('input', '', { type: 'number', step, ariaLabel: t(name), title: t(name) })
    })
    row.append(element('span', '', { textContent: t(label) }), slider, from, to, count)
    for (const input of [slider, from, to, count]) input.addEventListener('change', () => this.readForm())
    return { row, slider, from, to, count, optional }
  }

  get isRunning() {
    return (this.state?.result?.progress ?? 1) < 1
  }

  /** @param {(result: SweepResult) => void} act */
  withResult(act) {
    if (this.state?.result) act(this.state.result)
  }

  /** Read the form; it then shows the sweep with invalid values replaced. */
  readForm() {
    delete this.element.dataset.form
    const axes = this.axisFields
      .filter(({ slider, optional }) => !(optional && Number(slider.value) === NONE))
      .map(({ slider, from, to, count }) => ({
        slider: slider.value ? Number(slider.value) : NaN,
        from: numberIn(from),
        to: numberIn(to),
        count: numberIn(count)
      }))
    this.actions.setSweep(readSweep({ axes, atOnce: numberIn(this.batchSize) }))
  }

  /** @param {State} state */
  show(state) {
    this.state = state
    this.showForm(state)
    const { result } = state
    for (const element of [this.frames, this.scrub, this.tools]) element.hidden = !result
    this.runButton.textContent = this.isRunning ? `■ ${t('stop')}` : `▶ ${t('sweep')}`
    this.runButton.title = this.isRunning ? t('stopTip') : t('sweepTip')
    if (!result) return
    this.showFrames(result)
    this.scrub.hidden = result.axes.length > 1
    this.scrub.max = String(result.strengths.length - 1)
    this.scrub.value = String(result.selected)
    this.caption.textContent = `${result.caption(result.selected)} · ${result.heading}`
    this.caption.title = this.caption.textContent
    this.saveButton.disabled = !result.complete
  }

  /** @param {State} state */
  showForm({ sweep, phrases }) {
    const state = JSON.stringify([sweep, phrases])
    if (this.element.dataset.form === state) return
    this.element.dataset.form = state
    this.axisFields.forEach(({ slider, from, to, count, optional }, k) => {
      const axis = sweep.axes[k]
      const options = phrases.map((phrase, n) => element('option', '', { value: String(n), textContent: phrase }))
      if (optional) options.unshift(element('option', '', { value: String(NONE), textContent: t('noSecondSlider') }))
      slider.replaceChildren(...options)
      slider.value = String(axis?.slider ?? NONE)
      const { from: first, to: last, count: number } = axis ?? DEFAULT_SECOND_AXIS
      from.value = String(first)
      to.value = String(last)
      count.value = String(number)
    })
    this.batchSize.value = String(sweep.batchSize)
    this.summary.textContent = sweep.axes
      .map(({ slider, from, to, count }) => t('sweepOf', phrases[slider] ?? slider + 1, from, to, count))
      .join(' × ')
  }

  /** @param {SweepResult} result */
  showFrames(result) {
    const state = JSON.stringify([result.strengths, result.files])
    if (this.shownFrames !== state) {
      this.shownFrames = state
      this.frames.style.gridTemplateColumns = `repeat(${result.columns}, minmax(28px, 1fr))`
      this.frames.ariaLabel = t('frames', result.heading)
      this.frames.replaceChildren(...result.files.map((file, k) => this.createFrame(result, file, k)))
    }
    ;[...this.frames.children].forEach((frame, k) => (frame.ariaSelected = String(k === result.selected)))
  }

  /** @param {SweepResult} result @param {ImageFile | undefined} file @param {number} k */
  createFrame(result, file, k) {
    const frame = element('div', 'es-frame', { title: result.caption(k), ariaLabel: result.caption(k) })
    frame.setAttribute('role', 'option')
    if (file) frame.append(element('img', '', { src: this.actions.imageUrl(file), alt: '', draggable: false }))
    if (result.axes.length === 1) frame.append(element('span', '', { textContent: result.caption(k) }))
    return frame
  }

  /** Index of the frame at or nearest to the pointer. @param {PointerEvent} event */
  frameAt({ clientX, clientY }) {
    const columns = this.state?.result?.columns ?? 1
    const { left, top, width, height } = this.frames.getBoundingClientRect()
    const scale = width / this.frames.offsetWidth || 1
    const rows = Math.ceil(this.frames.children.length / columns)
    const cell = (/** @type {number} */ offset, /** @type {number} */ size, /** @type {number} */ count) =>
      Math.min(Math.max(Math.floor((offset / size) * count), 0), count - 1)
    const column = cell(clientX - left + this.frames.scrollLeft * scale, this.frames.scrollWidth * scale, columns)
    const row = cell(clientY - top + this.frames.scrollTop * scale, this.frames.scrollHeight * scale, rows)
    return height ? row * columns + column : 0
  }

  /** Select another image by a key. @param {KeyboardEvent} event */
  onKey(event) {
    const { result } = this.state ?? {}
    if (!result) return
    /** @type {Record<string, number>} */
    const moves = {
      ArrowRight: result.selected + 1,
      ArrowLeft: result.selected - 1,
      ArrowDown: result.selected + result.columns,
      ArrowUp: result.selected - result.columns,
      Home: 0,
      End: result.strengths.length - 1
    }
    if (!(event.key in moves)) return
    event.preventDefault()
    this.select(moves[event.key])
  }

  /** Select image k, if there is one. @param {number} k */
  select(k) {
    const { result } = this.state ?? {}
    if (!result || !(k >= 0 && k < result.strengths.length)) return
    result.selected = k
    this.actions.select(result)
  }
}

/** @param {HTMLInputElement} input */
function numberIn(input) {
  return input.value.trim() ? Number(input.value) : NaN
}
