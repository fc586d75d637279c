// A sweep under the sliders: what to render, its pictures as they arrive, and a place to drag over them. Knows no node.

/** @import { Axis } from './api_graph.mjs' */
/** @import { File } from './own_jobs.mjs' */

import { sweepStrengths } from './api_graph.mjs'
import { button, element } from './elements.mjs'
import { t } from '../texts.mjs'

/**
 * @typedef {{ axes: Axis[], atOnce: number }} Sweep one axis or two
 * @typedef {'webp' | 'strip' | 'grid'} Format
 *
 * @typedef {object} Actions what the filmstrip asks for
 * @property {() => void} render
 * @property {() => void} stop
 * @property {(sweep: Sweep) => void} setSweep
 * @property {(film: Film) => void} show its shown frame
 * @property {(film: Film) => void} use set the sliders to the shown frame's strengths
 * @property {(film: Film, format: Format) => void} save
 * @property {(file: File) => string} address
 *
 * @typedef {object} State
 * @property {Sweep} sweep
 * @property {string[]} words of the sliders
 * @property {Film | undefined} film
 */

const MOST_SLIDERS = 50
const MOST_COUNT = 32
const NONE = -1
/** @type {Axis} */
const FIRST = { slider: 0, from: 0, to: 1.5, count: 7 }
/** @type {Axis} */
const SECOND = { slider: 1, from: 0, to: 1.5, count: 4 }
const AT_ONCE = 4

/** The pictures of one sweep; they outlive the node that asked for them. */
export class Film {
  /**
   * @param {Axis[]} axes
   * @param {string[]} words of the axes' sliders
   */
  constructor(axes, words) {
    this.axes = axes
    this.words = words
    this.strengths = sweepStrengths(axes)
    /** @type {(File | undefined)[]} */
    this.files = this.strengths.map(() => undefined)
    this.shown = 0
    /** @type {Record<string, string>} what ComfyUI keeps in a picture's file: graph and workflow as JSON */
    this.metadata = {}
    this.error = ''
    /** 0 to 1 while it is rendered, 1 afterwards */
    this.progress = 0
    this.stop = () => {}
    /** tells whoever shows it now */
    this.changed = () => {}
  }

  get columns() {
    return this.axes[0].count
  }

  get complete() {
    return this.files.every(Boolean)
  }

  get heading() {
    return this.words.join(' / ')
  }

  /** @param {number} k */
  caption(k) {
    return this.strengths[k].map((strength) => String(Math.round(strength * 100) / 100)).join(' / ')
  }
}

/**
 * Whatever a file holds, a sweep that can be rendered.
 * @param {unknown} found
 * @returns {Sweep}
 */
export function sanitised(found) {
  const { axes, atOnce } = /** @type {{ axes?: unknown, atOnce?: unknown }} */ (found ?? {})
  const [first, second] = Array.isArray(axes) ? axes : []
  const read = [axis(first, FIRST), ...(second ? [axis(second, SECOND)] : [])]
  if (read[1]?.slider === read[0].slider) read.pop()
  return { axes: read, atOnce: whole(atOnce, AT_ONCE, 1, MOST_COUNT ** 2) }
}

/** @param {Partial<Axis> | undefined} found @param {Axis} usual @returns {Axis} */
function axis(found, usual) {
  const number = (/** @type {unknown} */ value, /** @type {number} */ otherwise) =>
    typeof value === 'number' && Number.isFinite(value) ? Math.min(Math.max(value, -100), 100) : otherwise
  return {
    slider: whole(found?.slider, usual.slider, 0, MOST_SLIDERS - 1),
    from: number(found?.from, usual.from),
    to: number(found?.to, usual.to),
    count: whole(found?.count, usual.count, 1, MOST_COUNT)
  }
}

/** @param {unknown} value @param {number} usual @param {number} lowest @param {number} highest */
function whole(value, usual, lowest, highest) {
  return Number.isInteger(value) ? Math.min(Math.max(Number(value), lowest), highest) : usual
}

export class Filmstrip {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions
    /** @type {State | undefined} */
    this.state = undefined
    this.drawn = ''
    this.dragging = false
    this.element = element('div', 'es-film')
    this.run = button('', t('sweepTip'), () => (this.runs ? this.actions.stop() : this.actions.render()))
    this.run.classList.add('es-sweep')
    this.summary = element('summary')
    this.form = [this.fields('sweepAlong', false), this.fields('sweepAgainst', true)]
    this.atOnce = element('input', '', { type: 'number', min: '1', step: '1' })
    this.frames = element('div', 'es-frames', { tabIndex: 0 })
    this.frames.setAttribute('role', 'listbox')
    this.scrub = element('input', 'es-scrub', { type: 'range', min: '0', step: '1', ariaLabel: t('scrub') })
    this.format = element('select', '', { ariaLabel: t('saveAs') })
    for (const format of ['webp', 'strip', 'grid'])
      this.format.append(element('option', '', { value: format, textContent: t(`format_${format}`) }))
    this.caption = element('span', 'es-caption')
    this.save = button(t('save'), t('saveTip'), () =>
      this.withFilm((film) => this.actions.save(film, /** @type {Format} */ (this.format.value)))
    )
    this.tools = element('div', 'es-bar')
    this.build()
  }

  build() {
    const settings = element('details')
    const together = element('label', '', { textContent: `${t('atOnce')} `, title: t('atOnceTip') })
    together.append(this.atOnce)
    settings.append(this.summary, ...this.form.map(({ row }) => row), together)
    const head = element('div', 'es-film-head')
    head.append(this.run, settings)
    this.tools.append(
      this.caption,
      button(t('use'), t('useTip'), () => this.withFilm(this.actions.use)),
      this.format,
      this.save
    )
    this.element.append(head, this.frames, this.scrub, this.tools)
    this.atOnce.addEventListener('change', () => this.read())
    this.scrub.addEventListener('input', () => this.turnTo(Number(this.scrub.value)))
    this.frames.addEventListener('pointerdown', (event) => {
      this.dragging = true
      this.frames.setPointerCapture(event.pointerId)
      this.turnTo(this.at(event))
    })
    this.frames.addEventListener('pointermove', (event) => this.dragging && this.turnTo(this.at(event)))
    for (const end of ['pointerup', 'pointercancel'])
      this.frames.addEventListener(end, () => (this.dragging = false))
    this.frames.addEventListener('keydown', (event) => this.key(event))
  }

  /** One line of the form. @param {string} label @param {boolean} optional */
  fields(label, optional) {
    const row = element('div', 'es-axis')
    const slider = element('select', '', { ariaLabel: t(label) })
    const [from, to, count] = ['from', 'to', 'count'].map((name) =>
      element('input', '', { type: 'number', step: name === 'count' ? '1' : '0.05', ariaLabel: t(name), title: t(name) })
    )
    row.append(element('span', '', { textContent: t(label) }), slider, from, to, count)
    for (const input of [slider, from, to, count]) input.addEventListener('change', () => this.read())
    return { row, slider, from, to, count, optional }
  }

  get runs() {
    return (this.state?.film?.progress ?? 1) < 1
  }

  /** @param {(film: Film) => void} act */
  withFilm(act) {
    if (this.state?.film) act(this.state.film)
  }

  /** Take what was typed into the form; it then shows what was understood. */
  read() {
    delete this.element.dataset.form
    const axes = this.form
      .filter(({ slider, optional }) => !(optional && Number(slider.value) === NONE))
      .map(({ slider, from, to, count }) => ({
        slider: slider.value ? Number(slider.value) : NaN,
        from: numberIn(from),
        to: numberIn(to),
        count: numberIn(count)
      }))
    this.actions.setSweep(sanitised({ axes, atOnce: numberIn(this.atOnce) }))
  }

  /** @param {State} state */
  show(state) {
    this.state = state
    this.showForm(state)
    const { film } = state
    for (const part of [this.frames, this.scrub, this.tools]) part.hidden = !film
    this.run.textContent = this.runs ? `■ ${t('stop')}` : `▶ ${t('sweep')}`
    this.run.title = this.runs ? t('stopTip') : t('sweepTip')
    if (!film) return
    this.showFrames(film)
    this.scrub.hidden = film.axes.length > 1
    this.scrub.max = String(film.strengths.length - 1)
    this.scrub.value = String(film.shown)
    this.caption.textContent = `${film.caption(film.shown)} · ${film.heading}`
    this.caption.title = this.caption.textContent
    this.save.disabled = !film.complete
  }

  /** @param {State} state */
  showForm({ sweep, words }) {
    const shown = JSON.stringify([sweep, words])
    if (this.element.dataset.form === shown) return
    this.element.dataset.form = shown
    this.form.forEach(({ slider, from, to, count, optional }, k) => {
      const axis = sweep.axes[k]
      const options = words.map((word, n) => element('option', '', { value: String(n), textContent: word }))
      if (optional) options.unshift(element('option', '', { value: String(NONE), textContent: t('noSecond') }))
      slider.replaceChildren(...options)
      slider.value = String(axis?.slider ?? NONE)
      const { from: first, to: last, count: number } = axis ?? SECOND
      from.value = String(first)
      to.value = String(last)
      count.value = String(number)
    })
    this.atOnce.value = String(sweep.atOnce)
    this.summary.textContent = sweep.axes
      .map(({ slider, from, to, count }) => t('sweepOf', words[slider] ?? slider + 1, from, to, count))
      .join(' × ')
  }

  /** @param {Film} film */
  showFrames(film) {
    const drawn = JSON.stringify([film.strengths, film.files])
    if (this.drawn !== drawn) {
      this.drawn = drawn
      this.frames.style.gridTemplateColumns = `repeat(${film.columns}, minmax(28px, 1fr))`
      this.frames.ariaLabel = t('frames', film.heading)
      this.frames.replaceChildren(...film.files.map((file, k) => this.frame(film, file, k)))
    }
    ;[...this.frames.children].forEach((frame, k) => (frame.ariaSelected = String(k === film.shown)))
  }

  /** @param {Film} film @param {File | undefined} file @param {number} k */
  frame(film, file, k) {
    const frame = element('div', 'es-frame', { title: film.caption(k), ariaLabel: film.caption(k) })
    frame.setAttribute('role', 'option')
    if (file) frame.append(element('img', '', { src: this.actions.address(file), alt: '', draggable: false }))
    if (film.axes.length === 1) frame.append(element('span', '', { textContent: film.caption(k) }))
    return frame
  }

  /** The frame under the pointer, which may have left the strip. @param {PointerEvent} event */
  at({ clientX, clientY }) {
    const columns = this.state?.film?.columns ?? 1
    const { left, top, width, height } = this.frames.getBoundingClientRect()
    const scale = width / this.frames.offsetWidth || 1
    const rows = Math.ceil(this.frames.children.length / columns)
    const part = (/** @type {number} */ at, /** @type {number} */ whole, /** @type {number} */ count) =>
      Math.min(Math.max(Math.floor((at / whole) * count), 0), count - 1)
    const column = part(clientX - left + this.frames.scrollLeft * scale, this.frames.scrollWidth * scale, columns)
    const row = part(clientY - top + this.frames.scrollTop * scale, this.frames.scrollHeight * scale, rows)
    return height ? row * columns + column : 0
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const { film } = this.state ?? {}
    if (!film) return
    /** @type {Record<string, number>} */
    const moves = {
      ArrowRight: film.shown + 1,
      ArrowLeft: film.shown - 1,
      ArrowDown: film.shown + film.columns,
      ArrowUp: film.shown - film.columns,
      Home: 0,
      End: film.strengths.length - 1
    }
    if (!(event.key in moves)) return
    event.preventDefault()
    this.turnTo(moves[event.key])
  }

  /** @param {number} k */
  turnTo(k) {
    const { film } = this.state ?? {}
    if (!film || !(k >= 0 && k < film.strengths.length)) return
    film.shown = k
    this.actions.show(film)
  }
}

/** @param {HTMLInputElement} input */
function numberIn(input) {
  return input.value.trim() ? Number(input.value) : NaN
}
