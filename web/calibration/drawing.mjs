// Draws a calibration curve: position to the right, strength upwards. Knows no node.

import { strengthAt } from './curve.mjs'
import { t } from '../texts.mjs'

/** @import { Point } from './curve.mjs' */

/**
 * @typedef {object} Picture
 * @property {Point[]} points those of the curve's text; none: positions are passed on as they are
 * @property {Point[]} line what lies between them, as close as it is known
 * @property {number | undefined} position where the slider stands
 *
 * @typedef {ReturnType<typeof scale>} Scale
 */

const SVG = 'http://www.w3.org/2000/svg'
const [WIDTH, HEIGHT] = [300, 180]
const [LEFT, RIGHT, TOP, BOTTOM] = [40, 290, 10, 150]
const MIDDLE = (TOP + BOTTOM) / 2
const STEPS = [0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50]
const MOST_STEPS = 5

/** @param {Picture} picture */
export function draw({ points, line, position }) {
  const unused = !points.length
  const marked = unused || position === undefined ? [] : [onLine(line, position)]
  const whole = unused ? [] : reaching(line, marked)
  const [across, up] = [scale(whole, 0, LEFT, RIGHT), scale(whole, 1, BOTTOM, TOP)]
  const [low, high] = [Math.max(across.low, up.low), Math.min(across.high, up.high)]
  const path = (/** @type {string} */ name, /** @type {Point[]} */ through) =>
    part('polyline', { class: name, points: through.map(([x, y]) => `${across.at(x)},${up.at(y)}`).join(' ') })
  const dot = (/** @type {string} */ name, /** @type {Point} */ [x, y], /** @type {number} */ r) =>
    part('circle', { class: name, cx: across.at(x), cy: up.at(y), r })

  const label = inWords(points, marked)
  const svg = part('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': label })
  svg.classList.toggle('es-unused', unused)
  svg.append(...axes(across, up), path('es-same', [[low, low], [high, high]]))
  if (!unused) svg.append(path('es-line', whole), ...points.map((point) => dot('es-point', point, 2.5)))
  for (const [x, y] of marked)
    svg.append(
      path('es-at', [[x, up.low], [x, y], [across.low, y]]),
      dot('es-marker', [x, y], 5),
      part('text', { class: 'es-now', x: RIGHT, y: HEIGHT - 4 }, `${shown(x)} → ${shown(y)}`)
    )
  return svg
}

/** @param {Point[]} line @param {number} position @returns {Point} */
const onLine = (line, position) => [position, strengthAt(line, position)]

/** A line as far as the points that are marked on it. @param {Point[]} line @param {Point[]} marked */
function reaching(line, marked) {
  const [first, last] = [line[0][0], line[line.length - 1][0]]
  return [...line, ...marked.filter(([x]) => x < first || x > last)].sort(([a], [b]) => a - b)
}

/**
 * Where numbers are drawn, from 0 to 1 at least.
 * @param {Point[]} points
 * @param {0 | 1} of positions or strengths
 * @param {number} from
 * @param {number} to
 */
function scale(points, of, from, to) {
  const values = points.map((point) => point[of])
  const [low, high] = [Math.min(0, ...values), Math.max(1, ...values)]
  const step = STEPS.find((step) => (high - low) / step <= MOST_STEPS) ?? high - low
  const ticks = []
  for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(k * step)
  const at = (/** @type {number} */ value) =>
    Math.round((from + ((value - low) / (high - low)) * (to - from)) * 10) / 10
  return { low, high, ticks, at }
}

/** @param {Scale} across @param {Scale} up */
function axes(across, up) {
  const turned = `translate(10 ${MIDDLE}) rotate(-90)`
  return [
    ...across.ticks.flatMap((tick) => {
      const x = across.at(tick)
      return [part('line', { x1: x, x2: x, y1: TOP, y2: BOTTOM }), part('text', { x, y: BOTTOM + 13 }, shown(tick))]
    }),
    ...up.ticks.flatMap((tick) => {
      const y = up.at(tick)
      const number = part('text', { class: 'es-left', x: LEFT - 5, y: y + 3.5 }, shown(tick))
      return [part('line', { x1: LEFT, x2: RIGHT, y1: y, y2: y }), number]
    }),
    part('text', { x: (LEFT + RIGHT) / 2, y: HEIGHT - 4 }, t('position')),
    part('text', { transform: turned }, t('strength'))
  ]
}

/** @param {Point[]} points @param {Point[]} marked */
function inWords(points, marked) {
  if (!points.length) return t('curveUnused')
  const say = (/** @type {Point} */ [x, y]) => t('curvePoint', shown(x), shown(y))
  return [t('curveOf', points.map(say).join(', ')), ...marked.map((point) => t('curveNow', say(point)))].join(' ')
}

/** @param {number} value */
const shown = (value) => String(Math.round(value * 1000) / 1000)

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 */
function part(tag, attributes, text = '') {
  const made = document.createElementNS(SVG, tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value))
  made.textContent = text
  return made
}
