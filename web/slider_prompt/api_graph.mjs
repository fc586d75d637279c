// Graphs as they are queued: which nodes depend on one, fewer steps for a quick look, many strengths in one run.

/**
 * @typedef {{ class_type: string, inputs: Record<string, unknown> }} ApiNode
 * @typedef {Record<string, ApiNode>} ApiGraph node id -> node; a link is [node id, output]
 * @typedef {{ input?: { required?: Inputs, optional?: Inputs }, output?: unknown[], output_node?: boolean }} Definition
 * @typedef {Record<string, [unknown, ...unknown[]]>} Inputs
 * @typedef {Record<string, Definition>} Definitions as /object_info has them
 *
 * @typedef {object} Axis one slider of a sweep
 * @property {number} slider counted from 0
 * @property {number} from
 * @property {number} to
 * @property {number} count
 */

const LATENT = 'LATENT'
const SIGMAS = 'SIGMAS'
const IMAGE = 'IMAGE'

/** @param {unknown} value @returns {value is [string, number]} */
const isLink = (value) => Array.isArray(value) && value.length === 2 && typeof value[0] === 'string'

/** @param {ApiNode} node */
const sources = (node) => Object.values(node.inputs).filter(isLink).map(([id]) => id)

/**
 * The ids under which a node of the page is queued: several if it lies in a subgraph that is used several times.
 * @param {ApiGraph} graph
 * @param {string | number} id of the node in its own graph
 * @param {boolean} inside whether that is a subgraph
 */
export function idsOf(graph, id, inside) {
  return Object.keys(graph).filter((key) => (inside ? key.endsWith(`:${id}`) : key === `${id}`))
}

/**
 * Nodes and all that depend on them.
 * @param {ApiGraph} graph
 * @param {string[]} ids
 */
export function below(graph, ids) {
  const found = new Set(ids)
  for (const id of found)
    for (const [other, node] of Object.entries(graph)) if (sources(node).includes(id)) found.add(other)
  return [...found]
}

/** Nodes and all that they depend on. @param {ApiGraph} graph @param {string[]} ids */
function above(graph, ids) {
  const found = new Set(ids)
  for (const id of found) for (const source of sources(graph[id] ?? { inputs: {} })) found.add(source)
  return found
}

/** @param {ApiGraph} graph @param {string[]} ids @param {Definitions} definitions */
export function outputsAmong(graph, ids, definitions) {
  return ids.filter((id) => definitions[graph[id].class_type]?.output_node)
}

/**
 * The graph with at most `steps` steps in the samplers among `ids` and in the schedulers that feed them.
 * @param {ApiGraph} graph
 * @param {string[]} ids
 * @param {Definitions} definitions
 * @param {number} steps
 * @returns {ApiGraph}
 */
export function withFewerSteps(graph, ids, definitions, steps) {
  const schedulers = ids.flatMap((id) => sources(graph[id])).filter((id) => gives(graph, id, definitions, SIGMAS))
  const changed = { ...graph }
  for (const id of [...ids, ...schedulers]) {
    const { inputs } = graph[id]
    const samples = gives(graph, id, definitions, LATENT) || gives(graph, id, definitions, SIGMAS)
    if (!samples || 'start_at_step' in inputs || typeof inputs.steps !== 'number' || inputs.steps <= steps) continue
    changed[id] = { ...graph[id], inputs: { ...inputs, steps } }
  }
  return changed
}

/** Evenly spaced, as slider_core/sweep.py. @param {Axis} axis */
export function spaced({ from, to, count }) {
  return Array.from({ length: count }, (_, k) => round(count === 1 ? from : from + ((to - from) * k) / (count - 1)))
}

/** @param {number} value */
const round = (value) => Math.round(value * 1e6) / 1e6

/**
 * The strengths of each picture of a sweep, one per axis; the first axis runs along the rows.
 * @param {Axis[]} axes one or two
 */
export function sweepStrengths([across, down]) {
  const columns = spaced(across)
  if (!down) return columns.map((strength) => [strength])
  return spaced(down).flatMap((second) => columns.map((first) => [first, second]))
}

/**
 * The graph with copies of what depends on a Slider Prompt, each of which renders some of the strengths in one batch.
 * @param {ApiGraph} graph
 * @param {string} id the Slider Prompt
 * @param {Definitions} definitions
 * @param {Axis[]} axes
 * @param {number} atOnce pictures per batch
 * @returns {{ graph: ApiGraph, targets: string[] } | undefined} targets: previews of all pictures, in order;
 *   undefined where no picture depends on the node
 */
export function sweepGraph(graph, id, definitions, axes, atOnce) {
  const dependent = below(graph, [id])
  const picture = firstPicture(graph, dependent, definitions)
  if (!picture) return
  const needed = above(graph, [picture[0]])
  const chain = dependent.filter((key) => needed.has(key))
  const latents = latentInputs(graph, chain, definitions)
  const strengths = sweepStrengths(axes)
  const swept = { ...graph }
  const targets = []
  for (let first = 0; first < strengths.length; first += atOnce) {
    const batch = strengths.slice(first, first + atOnce)
    const name = (/** @type {string} */ key) => `sweep${first}_${key.replaceAll(':', '_')}`
    const lists = axes.map((_, k) => name(`strengths${k}`))
    lists.forEach((list, k) => {
      const values = batch.map((row) => row[k]).join(', ')
      swept[list] = { class_type: 'EditSlidersStrengthList', inputs: { values } }
    })
    for (const key of chain) {
      const inputs = Object.fromEntries(
        Object.entries(graph[key].inputs).map(([input, value]) => [
          input,
          isLink(value) && chain.includes(value[0]) ? [name(value[0]), value[1]] : value
        ])
      )
      if (key === id) axes.forEach(({ slider }, k) => (inputs[`strength_${slider + 1}`] = [lists[k], 0]))
      const input = latents.get(key)
      if (input) {
        const repeated = name(`latent_${key}`)
        const strengths = [lists[0], 0]
        swept[repeated] = { class_type: 'EditSlidersLatentForSweep', inputs: { latent: inputs[input], strengths } }
        inputs[input] = [repeated, 0]
      }
      swept[name(key)] = { ...graph[key], inputs }
    }
    const preview = name('pictures')
    swept[preview] = { class_type: 'PreviewImage', inputs: { images: [name(picture[0]), picture[1]] } }
    targets.push(preview)
  }
  return { graph: swept, targets }
}

/**
 * What the first output node that shows one gets as its picture.
 * @param {ApiGraph} graph @param {string[]} dependent @param {Definitions} definitions
 */
function firstPicture(graph, dependent, definitions) {
  for (const id of outputsAmong(graph, dependent, definitions)) {
    const { inputs, class_type: type } = graph[id]
    const link = Object.entries(inputs).find(
      ([input, value]) => takes(definitions[type], input) === IMAGE && isLink(value) && dependent.includes(value[0])
    )?.[1]
    if (isLink(link)) return link
  }
}

/**
 * The nodes that make a latent of a latent, with the name of the input: there the batch is made as long as the list of
 * strengths, and all its pictures get the same noise, which a way through pixels would have lost.
 * @param {ApiGraph} graph @param {string[]} chain @param {Definitions} definitions
 * @returns {Map<string, string>}
 */
function latentInputs(graph, chain, definitions) {
  const found = new Map()
  for (const id of chain) {
    const definition = definitions[graph[id].class_type]
    const input = Object.entries(graph[id].inputs).find(
      ([name, value]) => takes(definition, name) === LATENT && isLink(value)
    )?.[0]
    if (input && gives(graph, id, definitions, LATENT)) found.set(id, input)
  }
  return found
}

/** @param {Definition | undefined} definition @param {string} input */
function takes(definition, input) {
  return { ...definition?.input?.required, ...definition?.input?.optional }[input]?.[0]
}

/** @param {ApiGraph} graph @param {string} id @param {Definitions} definitions @param {string} type */
function gives(graph, id, definitions, type) {
  return definitions[graph[id]?.class_type]?.output?.includes(type) ?? false
}
