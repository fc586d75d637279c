// Reads a calibration curve as slider_core/calibration.py does. The page draws straight lines between the points that
// it knows: those of the text, and after a run closer ones.

import { t } from '../texts.mjs'

/** @typedef {[number, number]} Point a position and its strength */

const LIMIT = 100
const EXAMPLE = '{"positions": [0, 0.5, 1], "strengths": [0.2, 0.7, 1]}'

/**
 * The points of a curve, none of empty text; or what is wrong with the text.
 * @param {string} text
 * @returns {{ points: Point[], error: string }}
 */
export function parse(text) {
  if (!text.trim()) return { points: [], error: '' }
  const content = fromJson(text)
  if (Object.keys(content).sort().join() !== 'positions,strengths') return wrong(t('noCurve', EXAMPLE))
  const { positions, strengths } = content
  for (const name of ['positions', 'strengths']) if (!rises(content[name])) return wrong(t('curveMustRise', name))
  if (positions.length !== strengths.length) return wrong(t('curveUneven', positions.length, strengths.length))
  const last = positions.length - 1
  if (positions[0] > 0 || positions[last] < 1) return wrong(t('curveTooShort', positions[0], positions[last]))
  return { points: positions.map((/** @type {number} */ x, /** @type {number} */ k) => [x, strengths[k]]), error: '' }
}

/**
 * On the straight lines between points; beyond them as steep as from position 0 to 1 on average.
 * @param {Point[]} points
 * @param {number} position
 * @returns {number}
 */
export function strengthAt(points, position) {
  const inside = Math.min(Math.max(position, points[0][0]), points[points.length - 1][0])
  const k = Math.max(1, points.findIndex(([known]) => known >= inside))
  const [[x, y], [nextX, nextY]] = [points[k - 1], points[k]]
  const strength = y + ((nextY - y) * (inside - x)) / (nextX - x)
  if (inside === position) return strength
  return strength + (position - inside) * (strengthAt(points, 1) - strengthAt(points, 0))
}

/** @param {string} error */
const wrong = (error) => ({ points: [], error })

/** @param {string} text @returns {Record<string, any>} nothing in it if it is no object in JSON */
function fromJson(text) {
  try {
    return Object(JSON.parse(text))
  } catch {
    return {}
  }
}

/** @param {unknown} values */
function rises(values) {
  if (!Array.isArray(values) || values.length < 2) return false
  const known = values.every((value) => typeof value === 'number' && Math.abs(value) <= LIMIT)
  return known && values.every((value, k) => !k || value > values[k - 1])
}
