// Draws a calibration curve as SVG: position on the x axis, strength on the y axis. Independent of nodes.

import { strengthAt } from './curve.mjs'
import { t } from '../shared/texts.mjs'

/** @import { Point } from './curve.mjs' */

/**
 * @typedef {object} Curve
 * @property {Point[]} points the curve's own points; none if positions are used as strengths without a curve
 * @property {Point[]} line points to draw the line through: `points`, or more closely spaced ones
 * @property {number | undefined} position the slider's position; undefined if it is not known
 *
 * @typedef {ReturnType<typeof scale>} Scale
 */

const SVG = 'http://www.w3.org/2000/svg'
const [WIDTH, HEIGHT] = [300, 180]
const [LEFT, RIGHT, TOP, BOTTOM] = [40, 290, 10, 150]
const MIDDLE = (TOP + BOTTOM) / 2
const STEPS = [0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50]
const MAX_STEPS = 5

/** Draw a curve with its axes, its points and a marker at the slider's position. @param {Curve} curve */
export function draw({ points, line, position }) {
  const unused = !points.length
  const markers = unused || position === undefined ? [] : [pointAt(line, position)]
  const extended = unused ? [] : extendedLine(line, markers)
  const [xScale, yScale] = [scale(extended, 0, LEFT, RIGHT), scale(extended, 1, BOTTOM, TOP)]
  const [low, high] = [Math.max(xScale.low, yScale.low), Math.min(xScale.high, yScale.high)]
  const path = (/** @type {string} */ name, /** @type {Point[]} */ vertices) =>
    svgElement('polyline', {
      class: name,
      points: vertices.map(([x, y]) => `${xScale.pixel(x)},${yScale.pixel(y)}`).join(' ')
    })
  const dot = (/** @type {string} */ name, /** @type {Point} */ [x, y], /** @type {number} */ r) =>
    svgElement('circle', { class: name, cx: xScale.pixel(x), cy: yScale.pixel(y), r })

  const label = description(points, markers)
  const svg = svgElement('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': label })
  svg.classList.toggle('es-unused', unused)
  svg.append(...axes(xScale, yScale), path('es-identity', [[low, low], [high, high]]))
  if (!unused) svg.append(path('es-line', extended), ...points.map((point) => dot('es-point', point, 2.5)))
  for (const [x, y] of markers)
    svg.append(
      path('es-guide', [[x, yScale.low], [x, y], [xScale.low, y]]),
      dot('es-marker', [x, y], 5),
      svgElement('text', { class: 'es-current', x: RIGHT, y: HEIGHT - 4 }, `${format(x)} → ${format(y)}`)
    )
  return svg
}

/** @param {Point[]} line @param {number} position @returns {Point} */
const pointAt = (line, position) => [position, strengthAt(line, position)]

/** The line, extended to markers beyond its ends. @param {Point[]} line @param {Point[]} markers */
function extendedLine(line, markers) {
  const [first, last] = [line[0][0], line[line.length - 1][0]]
  return [...line, ...markers.filter(([x]) => x < first || x > last)].sort(([a], [b]) => a - b)
}

/**
 * The scale of an axis, which contains the points and the range from 0 to 1.
 * @param {Point[]} points
 * @param {0 | 1} coordinate 0: position, 1: strength
 * @param {number} from pixel of the lower end
 * @param {number} to pixel of the upper end
 */
function scale(points, coordinate, from, to) {
  const values = points.map((point) => point[coordinate])
  const [low, high] = [Math.min(0, ...values), Math.max(1, ...values)]
  const step = STEPS.find((step) => (high - low) / step <= MAX_STEPS) ?? high - low
  const ticks = []
  for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(k * step)
  const pixel = (/** @type {number} */ value) =>
    Math.round((from + ((value - low) / (high - low)) * (to - from)) * 10) / 10
  return { low, high, ticks, pixel }
}

/** Grid lines, tick labels and axis labels. @param {Scale} xScale @param {Scale} yScale */
function axes(xScale, yScale) {
  const rotated = `translate(10 ${MIDDLE}) rotate(-90)`
  return [
    ...xScale.ticks.flatMap((tick) => {
      const x = xScale.pixel(tick)
      const label = svgElement('text', { x, y: BOTTOM + 13 }, format(tick))
      return [svgElement('line', { x1: x, x2: x, y1: TOP, y2: BOTTOM }), label]
    }),
    ...yScale.ticks.flatMap((tick) => {
      const y = yScale.pixel(tick)
      const label = svgElement('text', { class: 'es-tick', x: LEFT - 5, y: y + 3.5 }, format(tick))
      return [svgElement('line', { x1: LEFT, x2: RIGHT, y1: y, y2: y }), label]
    }),
    svgElement('text', { x: (LEFT + RIGHT) / 2, y: HEIGHT - 4 }, t('position')),
    svgElement('text', { transform: rotated }, t('strength'))
  ]
}

/** The curve as text, for screen readers. @param {Point[]} points @param {Point[]} markers */
function description(points, markers) {
  if (!points.length) return t('curveUnused')
  const pointText = (/** @type {Point} */ [x, y]) => t('curvePoint', format(x), format(y))
  const curve = t('curveOf', points.map(pointText).join(', '))
  return [curve, ...markers.map((point) => t('curveNow', pointText(point)))].join(' ')
}

/** @param {number} value */
const format = (value) => String(Math.round(value * 1000) / 1000)

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 */
function svgElement(tag, attributes, text = '') {
  const created = document.createElementNS(SVG, tag)
  for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, String(value))
  created.textContent = text
  return created
}
