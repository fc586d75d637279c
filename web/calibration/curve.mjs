// Parses and evaluates a calibration curve, like slider_core/metrics/calibration.py. The page draws straight lines
// between the curve's points or, after a run, between the closely spaced points that the run has returned.

import { t } from '../shared/texts.mjs'

/** @typedef {[number, number]} Point position and strength */

const MAX_VALUE = 100
const EXAMPLE = '{"positions": [0, 0.5, 1], "strengths": [0.2, 0.7, 1]}'

/**
 * The points of a curve, or an error message. Empty text has no points.
 * @param {string} text
 * @returns {{ points: Point[], error: string }}
 */
export function parse(text) {
  if (!text.trim()) return { points: [], error: '' }
  const content = parseObject(text)
  if (Object.keys(content).sort().join() !== 'positions,strengths') return invalid(t('invalidCurve', EXAMPLE))
  const { positions, strengths } = content
  for (const name of ['positions', 'strengths'])
    if (!isIncreasing(content[name])) return invalid(t('curveNotIncreasing', name))
  if (positions.length !== strengths.length) return invalid(t('curveLengths', positions.length, strengths.length))
  const last = positions.length - 1
  if (positions[0] > 0 || positions[last] < 1) return invalid(t('curveRange', positions[0], positions[last]))
  return { points: positions.map((/** @type {number} */ x, /** @type {number} */ k) => [x, strengths[k]]), error: '' }
}

/**
 * The strength at a position: linear between points; beyond them with the mean slope from position 0 to 1.
 * @param {Point[]} points
 * @param {number} position
 * @returns {number}
 */
export function strengthAt(points, position) {
  const inside = Math.min(Math.max(position, points[0][0]), points[points.length - 1][0])
  const k = Math.max(1, points.findIndex(([x]) => x >= inside))
  const [[x, y], [nextX, nextY]] = [points[k - 1], points[k]]
  const strength = y + ((nextY - y) * (inside - x)) / (nextX - x)
  if (inside === position) return strength
  return strength + (position - inside) * (strengthAt(points, 1) - strengthAt(points, 0))
}

/** @param {string} error */
const invalid = (error) => ({ points: [], error })

/** @param {string} text @returns {Record<string, any>} empty if the text is not a JSON object */
function parseObject(text) {
  try {
    return Object(JSON.parse(text))
  } catch {
    return {}
  }
}

/** Whether this is an array of two or more increasing numbers within MAX_VALUE. @param {unknown} values */
function isIncreasing(values) {
  if (!Array.isArray(values) || values.length < 2) return false
  const inRange = values.every((value) => typeof value === 'number' && Math.abs(value) <= MAX_VALUE)
  return inRange && values.every((value, k) => !k || value > values[k - 1])
}
