// Splits a prompt into the phrases that get a slider. The server splits the same prompt in
// slider_core/text/instructions.py. tests/data/instruction_splitter_cases.json holds the cases on which both must agree.

/**
 * @typedef {{ start: number, end: number, text: string }} Phrase character range in the prompt, and its text without
 *   marks, weights and parentheses
 * @typedef {{ phrases: Phrase[], error: string }} Parsed error: empty if there is none
 */

import { t } from '../shared/texts.mjs'

export const LINES = 'one per line'

const LINE_END = /\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/g // Python's splitlines
const MARK = /\\?(\[\[|\]\])/g
const VISIBLE = /[^\p{C}\p{Z}]/u
const WEIGHT = /:\s*[-+]?[\d.]+\s*\)/g

/**
 * The phrases of a prompt: its lines, or the phrases in [[double brackets]].
 * @param {string} text
 * @param {string} mode LINES, or any other value for marked phrases
 * @returns {Parsed}
 */
export function parse(text, mode) {
  return mode === LINES ? parseLines(text) : parseMarks(text)
}

/** @param {string} text @returns {Parsed} */
function parseLines(text) {
  const phrases = []
  let start = 0
  for (const end of [...text.matchAll(LINE_END), { index: text.length, 0: '' }]) {
    const line = text.slice(start, end.index)
    if (VISIBLE.test(line)) {
      const first = start + line.length - line.trimStart().length
      phrases.push(phrase(text, first, first + line.trim().length))
    }
    start = end.index + end[0].length
  }
  return { phrases, error: phrases.length ? '' : t('emptyPrompt') }
}

/** @param {string} text @returns {Parsed} */
function parseMarks(text) {
  /** @type {Phrase[]} */
  const phrases = []
  /** @type {number[]} indices of phrases that are not closed yet */
  const open = []
  for (const match of text.matchAll(MARK)) {
    const after = match.index + match[0].length
    if (match[0] === '[[') {
      open.push(phrases.length)
      phrases.push({ start: after, end: after, text: '' })
    } else if (match[0] === ']]') {
      const opened = open.pop()
      if (opened === undefined) return { phrases, error: t('markNotOpened') }
      phrases[opened] = phrase(text, phrases[opened].start, match.index)
      if (!phrases[opened].text) return { phrases, error: t('markEmpty') }
    }
  }
  if (open.length) return { phrases, error: t('markNotClosed') }
  return { phrases, error: phrases.length ? '' : t('noMark') }
}

/** @param {string} text @param {number} start @param {number} end @returns {Phrase} */
function phrase(text, start, end) {
  const visible = text
    .slice(start, end)
    .replace(WEIGHT, ')')
    .replace(/\\([()])|\[\[|\]\]|[()]/g, '$1')
  return { start, end, text: visible.trim() }
}

/**
 * One value per phrase after the prompt was edited: phrases before and after the edited ones keep their values.
 * @param {Phrase[]} before
 * @param {Phrase[]} after
 * @param {number[]} values one per phrase of `before`
 * @param {number} defaultValue for new phrases
 * @returns {number[]}
 */
export function preserveValues(before, after, values, defaultValue) {
  if (before.length === after.length) return values.slice(0, after.length)
  const shorter = Math.min(before.length, after.length)
  let head = 0
  while (head < shorter && before[head].text === after[head].text) head++
  let tail = 0
  while (tail < shorter - head && before.at(-1 - tail)?.text === after.at(-1 - tail)?.text) tail++
  const edited = values.slice(head, before.length - tail)
  return [
    ...values.slice(0, head),
    ...Array.from({ length: Math.max(0, after.length - head - tail) }, (_, k) => edited[k] ?? defaultValue),
    ...values.slice(before.length - tail, before.length)
  ]
}
