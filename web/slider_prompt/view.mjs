// What a Slider Prompt shows: the text with its phrases in colour, and a slider for each of them. Knows no node.

/** @import { Phrase, Parsed } from './phrases.mjs' */
/** @import { PhraseTokens } from './tokens.mjs' */

import { button, element } from './elements.mjs'
import { t } from '../texts.mjs'

/**
 * @typedef {object} Actions what the view asks for
 * @property {(text: string) => void} setText
 * @property {(k: number, strength: number) => void} setStrength
 * @property {(strengths: number[]) => void} setAll
 * @property {() => void} released a slider that was dragged is let go
 * @property {(live: boolean) => void} setLive
 * @property {(event: WheelEvent) => void} wheel nothing here can be scrolled that way
 *
 * @typedef {object} State what the view shows
 * @property {string} text
 * @property {boolean} textLinked the text comes from another node
 * @property {Parsed} parsed
 * @property {number[]} strengths one per phrase
 * @property {boolean[]} linked whether a strength comes from another node
 * @property {number} lowest
 * @property {number} highest
 * @property {boolean} live
 * @property {string} error what the server says of the text
 * @property {PhraseTokens[]} tokens one per phrase, or none while they are unknown
 */

const NONE = -1
const NEUTRAL = 1
const STEP = 0.05
const FINE = 0.01
const COLOURS = ['#e06c75', '#61afef', '#98c379', '#e5c07b', '#c678dd', '#56b6c2', '#d19a66', '#be5046']

const STYLE = `
.es-slider-prompt { display: flex; flex-direction: column; gap: 4px; height: 100%; font: 12px sans-serif; color: #ddd;
  overflow: hidden auto; box-sizing: border-box; position: relative; contain: strict; min-height: 220px; }
.es-text { position: relative; flex: 1 1 60px; min-height: 60px; background: #222; border-radius: 4px; }
.es-text > * { position: absolute; inset: 0; margin: 0; padding: 4px 6px; border: 0; font: 12px/1.4 monospace;
  white-space: pre-wrap; overflow-wrap: break-word; overflow: auto; box-sizing: border-box; }
.es-text textarea { background: transparent; color: #ddd; resize: none; width: 100%; height: 100%; outline-offset: -1px; }
.es-shade { color: transparent; pointer-events: none; scrollbar-gutter: stable; }
.es-shade mark { color: transparent; border-radius: 3px; }
.es-error { color: #f0716b; min-height: 1.2em; }
.es-error:empty { display: none; }
.es-rows { flex: 0 1 auto; overflow: auto; display: flex; flex-direction: column; gap: 2px; min-height: 26px; }
.es-row { display: grid; grid-template-columns: 10px minmax(40px, 1fr) minmax(60px, 1.2fr) 58px; gap: 6px;
  align-items: center; }
.es-chip { width: 10px; height: 10px; border-radius: 3px; }
.es-words { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.es-row input { min-width: 0; }
.es-row input[type=number] { background: #222; color: #ddd; border: 1px solid #444; border-radius: 3px; width: 100%;
  box-sizing: border-box; }
.es-progress { height: 3px; background: #61afef; border-radius: 2px; width: 0; }
.es-picture { flex: 3 1 140px; min-height: 140px; object-fit: contain; }
.es-picture:not([src]) { display: none; }
.es-tokens { position: absolute; left: 16px; right: 0; z-index: 1; pointer-events: none; background: #1a1a1a;
  border: 1px solid #555; border-radius: 4px; padding: 3px 6px; font: 11px/1.5 monospace; overflow-wrap: anywhere; }
.es-tokens:empty { display: none; }
.es-tokens b { color: #999; font-weight: normal; }
.es-tokens i { font-style: normal; background: #3a3f4b; border-radius: 3px; padding: 0 3px; margin-right: 3px; }
.es-film { display: flex; flex-direction: column; gap: 4px; }
.es-film-head { display: flex; gap: 6px; align-items: start; }
.es-film-head details { flex: 1; min-width: 0; }
.es-film summary { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; cursor: pointer; line-height: 20px; }
.es-axis { display: grid; grid-template-columns: 56px minmax(40px, 1fr) 52px 52px 46px; gap: 4px; margin: 2px 0; }
.es-film input[type=number], .es-film select { background: #222; color: #ddd; border: 1px solid #444;
  border-radius: 3px; min-width: 0; box-sizing: border-box; font: inherit; }
.es-film label input { width: 46px; }
.es-frames { display: grid; gap: 2px; max-height: 200px; overflow: auto; touch-action: none; cursor: ew-resize; }
.es-frames[hidden], .es-film .es-bar[hidden] { display: none; }
.es-frame { display: flex; flex-direction: column; align-items: center; font-size: 10px; min-height: 28px;
  background: #222; border-radius: 3px; outline: 1px solid transparent; outline-offset: -1px; user-select: none; }
.es-frame img { width: 100%; pointer-events: none; }
.es-frame[aria-selected=true] { outline-color: #61afef; }
.es-caption { flex: 1; min-width: 60px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.es-bar { display: flex; gap: 4px; flex-wrap: wrap; }
.es-bar button, .es-bar label, .es-sweep { background: #454545; color: #ddd; border: 0; border-radius: 3px; padding: 2px 7px;
  cursor: pointer; font: inherit; }
`

/** @type {number[]} what was copied last, of any node */
let copied = []

/** @param {number} value */
const rounded = (value) => Math.round(value * 1e4) / 1e4

export class View {
  /**
   * @param {Actions} actions
   * @param {HTMLElement} film shown between the sliders and the picture
   */
  constructor(actions, film) {
    this.actions = actions
    this.dragging = false
    this.hovered = NONE
    /** @type {State | undefined} */
    this.state = undefined
    this.element = element('div', 'es-slider-prompt')
    this.area = element('textarea', '', { spellcheck: false, ariaLabel: t('prompt') })
    this.shade = element('div', 'es-shade')
    this.error = element('div', 'es-error')
    this.error.setAttribute('role', 'status')
    this.rows = element('div', 'es-rows')
    this.tokens = element('div', 'es-tokens')
    this.tokens.setAttribute('role', 'tooltip')
    this.locked = element('input', '', { type: 'checkbox' })
    this.live = element('input', '', { type: 'checkbox' })
    this.live.addEventListener('change', () => this.actions.setLive(this.live.checked))
    this.progress = element('div', 'es-progress')
    this.shaded = ''
    this.picture = element('img', 'es-picture', { alt: '' })
    this.failure = element('div', 'es-error')
    this.failure.setAttribute('role', 'alert')
    const text = element('div', 'es-text')
    text.append(this.shade, this.area)
    const style = element('style')
    style.textContent = STYLE
    this.element.append(style, text, this.error, this.bar(), this.rows, this.tokens, film)
    this.element.append(this.failure, this.progress, this.picture)
    this.area.addEventListener('input', () => this.actions.setText(this.area.value))
    this.area.addEventListener('scroll', () => (this.shade.scrollTop = this.area.scrollTop))
    for (const event of ['dblclick', 'paste', 'copy', 'cut'])
      this.element.addEventListener(event, (e) => e.stopPropagation())
    this.element.addEventListener('keydown', (event) => event.altKey || event.stopPropagation())
    for (const part of [this.area, this.rows, film]) part.dataset.captureWheel = 'true' // in Nodes 2.0, once focused
    this.element.addEventListener('wheel', (event) => this.wheel(event), { passive: false })
  }

  /** @param {WheelEvent} event */
  wheel(event) {
    const path = /** @type {Element[]} */ (event.composedPath())
    const inside = path.slice(0, path.indexOf(this.element))
    if (!event.ctrlKey && inside.some((part) => scrolls(part, event.deltaY))) event.stopPropagation()
    else this.actions.wheel(event)
  }

  bar() {
    const bar = element('div', 'es-bar')
    const lock = element('label', '', { title: t('lockTip') })
    lock.append(this.locked, ` ${t('lock')}`)
    const live = element('label', '', { title: t('liveTip') })
    live.append(this.live, ` ${t('live')}`)
    bar.append(
      button(t('reset'), t('resetTip'), () => this.reset()),
      button(t('copy'), t('copyTip'), () => (copied = this.strengths)),
      button(t('paste'), t('pasteTip'), () =>
        this.actions.setAll(this.strengths.map((value, k) => copied[k] ?? value))
      ),
      button(t('shuffle'), t('shuffleTip'), () =>
        this.actions.setAll(this.strengths.map(() => Math.round(Math.random() * 100) / 100))
      ),
      lock,
      live
    )
    return bar
  }

  reset() {
    this.actions.setAll(this.strengths.map(() => NEUTRAL))
  }

  get strengths() {
    return [...(this.state?.strengths ?? [])]
  }

  /** @param {State} state */
  show(state) {
    this.state = state
    if (this.area.value !== state.text) this.area.value = state.text
    this.area.disabled = state.textLinked
    this.live.checked = state.live
    this.error.textContent = state.textLinked ? t('promptLinked') : state.parsed.error || state.error
    this.showShade(state.text, state.textLinked ? [] : state.parsed.phrases)
    const { phrases } = state.parsed
    while (this.rows.children.length > phrases.length) this.rows.lastElementChild?.remove()
    while (this.rows.children.length < phrases.length) this.rows.append(this.row(this.rows.children.length))
    phrases.forEach((phrase, k) => this.showRow(phrase, k, state))
    if (this.hovered !== NONE) this.showTokens(this.hovered)
  }

  /** Nothing of an earlier run is shown any more. */
  clear() {
    this.picture.removeAttribute('src')
    this.failure.textContent = ''
    this.progress.style.width = '0'
  }

  /** @param {number} k */
  row(k) {
    const row = element('div', 'es-row')
    const chip = element('span', 'es-chip')
    chip.style.background = colour(k)
    const range = element('input', '', { type: 'range', step: 'any' })
    const number = element('input', '', { type: 'number', step: String(FINE) })
    const words = element('span', 'es-words')
    range.addEventListener('input', () => {
      this.dragging = true
      this.move(k, Math.round(Number(range.value) * 100) / 100)
    })
    for (const end of ['change', 'pointerup', 'pointercancel']) range.addEventListener(end, () => this.release())
    range.addEventListener('keydown', (event) => this.key(k, event))
    words.addEventListener('pointerenter', () => this.showTokens(k))
    words.addEventListener('pointerleave', () => this.showTokens(NONE))
    row.addEventListener('dblclick', (event) => event.target !== number && this.move(k, NEUTRAL))
    number.addEventListener('change', () => {
      const value = Number(number.value)
      if (number.value.trim() && Number.isFinite(value)) this.move(k, value)
      number.value = String(this.strengths[k])
    })
    row.append(chip, words, range, number)
    return row
  }

  release() {
    if (!this.dragging) return
    this.dragging = false
    this.actions.released()
  }

  /** What the words of a row become in each text encoder. @param {number} k the row, or NONE */
  showTokens(k) {
    this.hovered = k
    const row = /** @type {HTMLElement | undefined} */ (this.rows.children[k])
    if (row) this.tokens.style.top = `${row.offsetTop + row.offsetHeight - this.rows.scrollTop + 2}px`
    const lines = Object.entries(this.state?.tokens[k]?.tokens ?? {}).map(([encoder, pieces]) => {
      const line = element('div')
      line.append(element('b', '', { textContent: `${t('tokens', encoder, pieces.length)} ` }))
      line.append(...pieces.map((piece) => element('i', '', { textContent: piece })))
      return line
    })
    this.tokens.replaceChildren(...lines)
  }

  /** @param {string} text @param {Phrase[]} phrases */
  showShade(text, phrases) {
    const shown = JSON.stringify([text, phrases])
    if (this.shaded === shown) return
    this.shaded = shown
    this.shade.replaceChildren(...shaded(text, phrases))
  }

  /** @param {Phrase} phrase @param {number} k @param {State} state */
  showRow(phrase, k, state) {
    const shown = JSON.stringify([phrase.text, state.strengths[k], state.linked[k], state.lowest, state.highest])
    const row = /** @type {HTMLElement} */ (this.rows.children[k])
    if (row.dataset.shown === shown) return
    row.dataset.shown = shown
    const [, words, range, number] = /** @type {[Element, HTMLElement, HTMLInputElement, HTMLInputElement]} */ ([
      ...row.children
    ])
    const strength = state.strengths[k]
    words.textContent = phrase.text
    words.title = phrase.text
    for (const input of [range, number]) {
      input.disabled = state.linked[k]
      input.ariaLabel = t('strengthOf', phrase.text)
    }
    range.min = String(state.lowest)
    range.max = String(state.highest)
    range.value = String(strength)
    if (row.dataset.strength !== String(strength)) number.value = String(strength) // else somebody may be typing there
    row.dataset.strength = String(strength)
    number.title = state.linked[k] ? t('strengthLinked') : ''
  }

  /** @param {number} k @param {KeyboardEvent} event */
  key(k, event) {
    const step = event.shiftKey ? FINE : STEP
    const strength = this.strengths[k]
    /** @type {Record<string, number>} */
    const moves = {
      ArrowRight: strength + step,
      ArrowUp: strength + step,
      ArrowLeft: strength - step,
      ArrowDown: strength - step,
      PageUp: strength + 5 * STEP,
      PageDown: strength - 5 * STEP,
      Home: 0,
      End: 1
    }
    if (!(event.key in moves) || !this.state) return
    event.preventDefault()
    const { lowest, highest } = this.state
    this.move(k, rounded(Math.min(Math.max(moves[event.key], lowest), highest)))
  }

  /** @param {number} k @param {number} strength */
  move(k, strength) {
    const by = strength - this.strengths[k]
    if (this.locked.checked) this.actions.setAll(this.strengths.map((value) => rounded(value + by)))
    else this.actions.setStrength(k, strength)
  }
}

/** @param {number} k */
export function colour(k) {
  return COLOURS[k % COLOURS.length]
}

/** Whether a part of the page would itself follow the wheel. @param {Element} part @param {number} by */
function scrolls(part, by) {
  if (part.scrollHeight <= part.clientHeight || !/auto|scroll/.test(getComputedStyle(part).overflowY)) return false
  return by < 0 ? part.scrollTop > 0 : part.scrollTop + part.clientHeight < part.scrollHeight - 1
}

/**
 * @param {string} text
 * @param {Phrase[]} phrases
 * @returns {(Node | string)[]}
 */
function shaded(text, phrases) {
  /** @type {(Node | string)[]} */
  const parts = []
  let at = 0
  phrases.forEach(({ start, end }, k) => {
    if (start < at) return
    const mark = element('mark')
    mark.style.background = `${colour(k)}66`
    mark.textContent = text.slice(start, end)
    parts.push(text.slice(at, start), mark)
    at = end
  })
  return [...parts, text.slice(at), '\n']
}
