// The elements of a Slider Prompt: the prompt with colored phrases, and a slider for each phrase. Independent of nodes.

/** @import { Phrase, Parsed } from './phrases.mjs' */
/** @import { PhraseTokens } from './tokens.mjs' */

import { button, element } from '../shared/elements.mjs'
import { t } from '../shared/texts.mjs'

/**
 * @typedef {object} Actions called on user input
 * @property {(text: string) => void} setText
 * @property {(k: number, strength: number) => void} setStrength of slider k
 * @property {(strengths: number[]) => void} setAllStrengths one per slider
 * @property {() => void} endDrag a dragged slider was released
 * @property {(live: boolean) => void} setLive
 * @property {(event: WheelEvent) => void} wheel no element of the view can be scrolled in this direction
 *
 * @typedef {object} State what the view shows
 * @property {string} text
 * @property {boolean} textLinked whether the text comes from another node
 * @property {Parsed} parsed
 * @property {number[]} strengths one per phrase
 * @property {boolean[]} strengthLinked one per phrase: whether its strength comes from another node
 * @property {number} lowest minimum of the sliders
 * @property {number} highest maximum of the sliders
 * @property {boolean} live
 * @property {string} error from the server about the text; empty if there is none
 * @property {PhraseTokens[]} tokens one per phrase, or none if they are not loaded
 */

const NONE = -1
const DEFAULT_STRENGTH = 1
const STEP = 0.05
const FINE_STEP = 0.01
const COLORS = ['#e06c75', '#61afef', '#98c379', '#e5c07b', '#c678dd', '#56b6c2', '#d19a66', '#be5046']

const STYLE = `
.es-slider-prompt { display: flex; flex-direction: column; gap: 4px; height: 100%; font: 12px sans-serif; color: #ddd;
  overflow: hidden auto; box-sizing: border-box; position: relative; contain: strict; min-height: 220px; }
.es-text { position: relative; flex: 1 1 60px; min-height: 60px; background: #222; border-radius: 4px; }
.es-text > * { position: absolute; inset: 0; margin: 0; padding: 4px 6px; border: 0; font: 12px/1.4 monospace;
  white-space: pre-wrap; overflow-wrap: break-word; overflow: auto; box-sizing: border-box; }
.es-text textarea { background: transparent; color: #ddd; resize: none; width: 100%; height: 100%;
  outline-offset: -1px; }
.es-highlights { color: transparent; pointer-events: none; scrollbar-gutter: stable; }
.es-highlights mark { color: transparent; border-radius: 3px; }
.es-error { color: #f0716b; min-height: 1.2em; }
.es-error:empty { display: none; }
.es-rows { flex: 0 1 auto; overflow: auto; display: flex; flex-direction: column; gap: 2px; min-height: 26px; }
.es-row { display: grid; grid-template-columns: 10px minmax(40px, 1fr) minmax(60px, 1.2fr) 58px; gap: 6px;
  align-items: center; }
.es-chip { width: 10px; height: 10px; border-radius: 3px; }
.es-phrase { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.es-row input { min-width: 0; }
.es-row input[type=number] { background: #222; color: #ddd; border: 1px solid #444; border-radius: 3px; width: 100%;
  box-sizing: border-box; }
.es-progress { height: 3px; background: #61afef; border-radius: 2px; width: 0; }
.es-image { flex: 3 1 140px; min-height: 140px; object-fit: contain; }
.es-image:not([src]) { display: none; }
.es-tokens { position: absolute; left: 16px; right: 0; z-index: 1; pointer-events: none; background: #1a1a1a;
  border: 1px solid #555; border-radius: 4px; padding: 3px 6px; font: 11px/1.5 monospace; overflow-wrap: anywhere; }
.es-tokens:empty { display: none; }
.es-tokens b { color: #999; font-weight: normal; }
.es-tokens i { font-style: normal; background: #3a3f4b; border-radius: 3px; padding: 0 3px; margin-right: 3px; }
.es-filmstrip { display: flex; flex-direction: column; gap: 4px; }
.es-filmstrip-head { display: flex; gap: 6px; align-items: start; }
.es-filmstrip-head details { flex: 1; min-width: 0; }
.es-filmstrip summary { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; cursor: pointer;
  line-height: 20px; }
.es-axis { display: grid; grid-template-columns: 76px minmax(40px, 1fr) 52px 52px 46px; gap: 4px; margin: 2px 0; }
.es-filmstrip input[type=number], .es-filmstrip select { background: #222; color: #ddd; border: 1px solid #444;
  border-radius: 3px; min-width: 0; box-sizing: border-box; font: inherit; }
.es-filmstrip label input { width: 46px; }
.es-frames { display: grid; gap: 2px; max-height: 200px; overflow: auto; touch-action: none; cursor: ew-resize; }
.es-frames[hidden], .es-filmstrip .es-bar[hidden] { display: none; }
.es-frame { display: flex; flex-direction: column; align-items: center; font-size: 10px; min-height: 28px;
  background: #222; border-radius: 3px; outline: 1px solid transparent; outline-offset: -1px; user-select: none; }
.es-frame img { width: 100%; pointer-events: none; }
.es-frame[aria-selected=true] { outline-color: #61afef; }
.es-caption { flex: 1; min-width: 60px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.es-bar { display: flex; gap: 4px; flex-wrap: wrap; }
.es-bar button, .es-bar label, .es-sweep { background: #454545; color: #ddd; border: 0; border-radius: 3px;
  padding: 2px 7px; cursor: pointer; font: inherit; }
`

/** @type {number[]} strengths of the last copy from any Slider Prompt */
let clipboard = []

/** @param {number} value */
const round = (value) => Math.round(value * 1e4) / 1e4

export class View {
  /**
   * @param {Actions} actions
   * @param {HTMLElement} filmstrip placed between the sliders and the image
   */
  constructor(actions, filmstrip) {
    this.actions = actions
    this.dragging = false
    this.hovered = NONE
    /** @type {State | undefined} */
    this.state = undefined
    this.element = element('div', 'es-slider-prompt')
    this.textArea = element('textarea', '', { spellcheck: false, ariaLabel: t('prompt') })
    this.highlights = element('div', 'es-highlights')
    this.error = element('div', 'es-error')
    this.error.setAttribute('role', 'status')
    this.rows = element('div', 'es-rows')
    this.tokens = element('div', 'es-tokens')
    this.tokens.setAttribute('role', 'tooltip')
    this.moveTogether = element('input', '', { type: 'checkbox' })
    this.live = element('input', '', { type: 'checkbox' })
    this.live.addEventListener('change', () => this.actions.setLive(this.live.checked))
    this.progress = element('div', 'es-progress')
    this.highlighted = ''
    this.image = element('img', 'es-image', { alt: '' })
    this.runError = element('div', 'es-error')
    this.runError.setAttribute('role', 'alert')
    const text = element('div', 'es-text')
    text.append(this.highlights, this.textArea)
    const style = element('style')
    style.textContent = STYLE
    this.element.append(style, text, this.error, this.createButtons(), this.rows, this.tokens, filmstrip)
    this.element.append(this.runError, this.progress, this.image)
    this.textArea.addEventListener('input', () => this.actions.setText(this.textArea.value))
    this.textArea.addEventListener('scroll', () => (this.highlights.scrollTop = this.textArea.scrollTop))
    for (const event of ['dblclick', 'paste', 'copy', 'cut'])
      this.element.addEventListener(event, (e) => e.stopPropagation())
    this.element.addEventListener('keydown', (event) => event.altKey || event.stopPropagation())
    // In Nodes 2.0 these scroll once they have the focus.
    for (const scrollable of [this.textArea, this.rows, filmstrip]) scrollable.dataset.captureWheel = 'true'
    this.element.addEventListener('wheel', (event) => this.onWheel(event), { passive: false })
  }

  /** Scroll an element of the view if possible, else call the action. @param {WheelEvent} event */
  onWheel(event) {
    const path = /** @type {Element[]} */ (event.composedPath())
    const inside = path.slice(0, path.indexOf(this.element))
    if (!event.ctrlKey && inside.some((part) => canScroll(part, event.deltaY))) event.stopPropagation()
    else this.actions.wheel(event)
  }

  createButtons() {
    const bar = element('div', 'es-bar')
    const moveTogether = element('label', '', { title: t('moveTogetherTip') })
    moveTogether.append(this.moveTogether, ` ${t('moveTogether')}`)
    const live = element('label', '', { title: t('liveTip') })
    live.append(this.live, ` ${t('live')}`)
    bar.append(
      button(t('reset'), t('resetTip'), () => this.reset()),
      button(t('copy'), t('copyTip'), () => (clipboard = this.strengths)),
      button(t('paste'), t('pasteTip'), () =>
        this.actions.setAllStrengths(this.strengths.map((value, k) => clipboard[k] ?? value))
      ),
      button(t('randomize'), t('randomizeTip'), () =>
        this.actions.setAllStrengths(this.strengths.map(() => Math.round(Math.random() * 100) / 100))
      ),
      moveTogether,
      live
    )
    return bar
  }

  /** Set all sliders to 1. */
  reset() {
    this.actions.setAllStrengths(this.strengths.map(() => DEFAULT_STRENGTH))
  }

  get strengths() {
    return [...(this.state?.strengths ?? [])]
  }

  /** @param {State} state */
  show(state) {
    this.state = state
    if (this.textArea.value !== state.text) this.textArea.value = state.text
    this.textArea.disabled = state.textLinked
    this.live.checked = state.live
    this.error.textContent = state.textLinked ? t('promptLinked') : state.parsed.error || state.error
    this.showHighlights(state.text, state.textLinked ? [] : state.parsed.phrases)
    const { phrases } = state.parsed
    while (this.rows.children.length > phrases.length) this.rows.lastElementChild?.remove()
    while (this.rows.children.length < phrases.length) this.rows.append(this.createRow(this.rows.children.length))
    phrases.forEach((phrase, k) => this.updateRow(phrase, k, state))
    if (this.hovered !== NONE) this.showTokens(this.hovered)
  }

  /** Remove the image, the error and the progress of earlier runs. */
  clear() {
    this.image.removeAttribute('src')
    this.runError.textContent = ''
    this.progress.style.width = '0'
  }

  /** Create the row of slider k. @param {number} k */
  createRow(k) {
    const row = element('div', 'es-row')
    const chip = element('span', 'es-chip')
    chip.style.background = color(k)
    const range = element('input', '', { type: 'range', step: 'any' })
    const number = element('input', '', { type: 'number', step: String(FINE_STEP) })
    const label = element('span', 'es-phrase')
    range.addEventListener('input', () => {
      this.dragging = true
      this.move(k, Math.round(Number(range.value) * 100) / 100)
    })
    for (const end of ['change', 'pointerup', 'pointercancel']) range.addEventListener(end, () => this.endDrag())
    range.addEventListener('keydown', (event) => this.onKey(k, event))
    label.addEventListener('pointerenter', () => this.showTokens(k))
    label.addEventListener('pointerleave', () => this.showTokens(NONE))
    row.addEventListener('dblclick', (event) => event.target !== number && this.move(k, DEFAULT_STRENGTH))
    number.addEventListener('change', () => {
      const value = Number(number.value)
      if (number.value.trim() && Number.isFinite(value)) this.move(k, value)
      number.value = String(this.strengths[k])
    })
    row.append(chip, label, range, number)
    return row
  }

  endDrag() {
    if (!this.dragging) return
    this.dragging = false
    this.actions.endDrag()
  }

  /** Show the tokens of a phrase in each text encoder. @param {number} k index of the phrase, or NONE to hide them */
  showTokens(k) {
    this.hovered = k
    const row = /** @type {HTMLElement | undefined} */ (this.rows.children[k])
    if (row) this.tokens.style.top = `${row.offsetTop + row.offsetHeight - this.rows.scrollTop + 2}px`
    const lines = Object.entries(this.state?.tokens[k]?.tokens ?? {}).map(([encoder, tokens]) => {
      const line = element('div')
      line.append(element('b', '', { textContent: `${t('tokens', encoder, tokens.length)} ` }))
      line.append(...tokens.map((token) => element('i', '', { textContent: token })))
      return line
    })
    this.tokens.replaceChildren(...lines)
  }

  /** Color the phrases behind the text. @param {string} text @param {Phrase[]} phrases */
  showHighlights(text, phrases) {
    const state = JSON.stringify([text, phrases])
    if (this.highlighted === state) return
    this.highlighted = state
    this.highlights.replaceChildren(...highlight(text, phrases))
  }

  /** @param {Phrase} phrase @param {number} k @param {State} state */
  updateRow(phrase, k, state) {
    const strength = state.strengths[k]
    const shown = JSON.stringify([phrase.text, strength, state.strengthLinked[k], state.lowest, state.highest])
    const row = /** @type {HTMLElement} */ (this.rows.children[k])
    if (row.dataset.shown === shown) return
    row.dataset.shown = shown
    const [, label, range, number] = /** @type {[Element, HTMLElement, HTMLInputElement, HTMLInputElement]} */ ([
      ...row.children
    ])
    label.textContent = phrase.text
    label.title = phrase.text
    for (const input of [range, number]) {
      input.disabled = state.strengthLinked[k]
      input.ariaLabel = t('strengthOf', phrase.text)
    }
    range.min = String(state.lowest)
    range.max = String(state.highest)
    range.value = String(strength)
    if (row.dataset.strength !== String(strength)) number.value = String(strength) // keeps what is being typed
    row.dataset.strength = String(strength)
    number.title = state.strengthLinked[k] ? t('strengthLinked') : ''
  }

  /** Move slider k by a key. @param {number} k @param {KeyboardEvent} event */
  onKey(k, event) {
    const step = event.shiftKey ? FINE_STEP : STEP
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
    this.move(k, round(Math.min(Math.max(moves[event.key], lowest), highest)))
  }

  /** Set slider k; with 'link', move all by the same amount. @param {number} k @param {number} strength */
  move(k, strength) {
    const delta = strength - this.strengths[k]
    if (this.moveTogether.checked) this.actions.setAllStrengths(this.strengths.map((value) => round(value + delta)))
    else this.actions.setStrength(k, strength)
  }
}

/** The color of slider k and its phrase. @param {number} k */
function color(k) {
  return COLORS[k % COLORS.length]
}

/** Whether an element can be scrolled further in a direction. @param {Element} element @param {number} deltaY */
function canScroll(element, deltaY) {
  const { scrollTop, scrollHeight, clientHeight } = element
  if (scrollHeight <= clientHeight || !/auto|scroll/.test(getComputedStyle(element).overflowY)) return false
  return deltaY < 0 ? scrollTop > 0 : scrollTop + clientHeight < scrollHeight - 1
}

/**
 * The text as nodes, with a colored mark around each phrase.
 * @param {string} text
 * @param {Phrase[]} phrases
 * @returns {(Node | string)[]}
 */
function highlight(text, phrases) {
  /** @type {(Node | string)[]} */
  const parts = []
  let position = 0
  phrases.forEach(({ start, end }, k) => {
    if (start < position) return // nested in the phrase before
    const mark = element('mark')
    mark.style.background = `${color(k)}66`
    mark.textContent = text.slice(start, end)
    parts.push(text.slice(position, start), mark)
    position = end
  })
  return [...parts, text.slice(position), '\n']
}
