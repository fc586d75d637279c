// Functions of graphs in ComfyUI's API format: dependencies between nodes, fewer steps, and copies for a sweep.

/**
 * @typedef {{ class_type: string, inputs: Record<string, unknown> }} ApiNode
 * @typedef {Record<string, ApiNode>} ApiGraph node id -> node; a linked input is [node id, output index]
 * @typedef {{ input?: { required?: Inputs, optional?: Inputs }, output?: unknown[], output_node?: boolean }} Definition
 * @typedef {Record<string, [unknown, ...unknown[]]>} Inputs
 * @typedef {Record<string, Definition>} Definitions node type -> definition, as in /object_info
 *
 * @typedef {object} Axis a slider of a sweep and its strengths, evenly spaced
 * @property {number} slider index, from 0
 * @property {number} from first strength
 * @property {number} to last strength
 * @property {number} count number of strengths
 */

const LATENT = 'LATENT'
const SIGMAS = 'SIGMAS'
const IMAGE = 'IMAGE'

/** @param {unknown} value @returns {value is [string, number]} */
const isLink = (value) => Array.isArray(value) && value.length === 2 && typeof value[0] === 'string'

/** Ids of the nodes that a node is linked to by its inputs. @param {ApiNode} node */
const inputNodeIds = (node) => Object.values(node.inputs).filter(isLink).map(([id]) => id)

/**
 * The ids that a node of the page has in the API format: one, or one per use of the subgraph that it is in.
 * @param {ApiGraph} graph
 * @param {string | number} id of the node in its own graph
 * @param {boolean} inSubgraph
 */
export function queuedNodeIds(graph, id, inSubgraph) {
  return Object.keys(graph).filter((key) => (inSubgraph ? key.endsWith(`:${id}`) : key === `${id}`))
}

/**
 * Ids of nodes and of all nodes that depend on them.
 * @param {ApiGraph} graph
 * @param {string[]} ids
 */
export function descendants(graph, ids) {
  const reached = new Set(ids)
  for (const id of reached)
    for (const [other, node] of Object.entries(graph)) if (inputNodeIds(node).includes(id)) reached.add(other)
  return [...reached]
}

/** Ids of nodes and of all nodes that they depend on. @param {ApiGraph} graph @param {string[]} ids */
function ancestors(graph, ids) {
  const reached = new Set(ids)
  for (const id of reached) for (const input of inputNodeIds(graph[id] ?? { inputs: {} })) reached.add(input)
  return reached
}

/** The output nodes among `ids`. @param {ApiGraph} graph @param {string[]} ids @param {Definitions} definitions */
export function outputNodes(graph, ids, definitions) {
  return ids.filter((id) => definitions[graph[id].class_type]?.output_node)
}

/**
 * The graph with at most `maxSteps` steps in the samplers among `ids` and in the schedulers linked to them. Samplers
 * that start at a given step are left unchanged.
 * @param {ApiGraph} graph
 * @param {string[]} ids
 * @param {Definitions} definitions
 * @param {number} maxSteps
 * @returns {ApiGraph}
 */
export function limitSteps(graph, ids, definitions, maxSteps) {
  const schedulers = ids
    .flatMap((id) => inputNodeIds(graph[id]))
    .filter((id) => hasOutputType(graph, id, definitions, SIGMAS))
  const limited = { ...graph }
  for (const id of [...ids, ...schedulers]) {
    const { inputs } = graph[id]
    const samples = hasOutputType(graph, id, definitions, LATENT) || hasOutputType(graph, id, definitions, SIGMAS)
    if (!samples || 'start_at_step' in inputs || typeof inputs.steps !== 'number' || inputs.steps <= maxSteps) continue
    limited[id] = { ...graph[id], inputs: { ...inputs, steps: maxSteps } }
  }
  return limited
}

/** The strengths of an axis, as slider_core/sweep.py spaces them. @param {Axis} axis */
function axisStrengths({ from, to, count }) {
  return Array.from({ length: count }, (_, k) => round(count === 1 ? from : from + ((to - from) * k) / (count - 1)))
}

/** @param {number} value */
const round = (value) => Math.round(value * 1e6) / 1e6

/**
 * The strengths of each image of a sweep, one per axis. In a grid, images are in row-major order and the strength of
 * the first axis changes from column to column.
 * @param {Axis[]} axes one or two
 */
export function sweepStrengths([columnAxis, rowAxis]) {
  const columns = axisStrengths(columnAxis)
  if (!rowAxis) return columns.map((strength) => [strength])
  return axisStrengths(rowAxis).flatMap((second) => columns.map((first) => [first, second]))
}

/**
 * The graph plus, for each batch of the sweep, a copy of the nodes from a Slider Prompt to the first image that is
 * saved or previewed. In a copy the swept strengths are lists, and each latent is repeated once per strength.
 * @param {ApiGraph} graph
 * @param {string} id of the Slider Prompt
 * @param {Definitions} definitions
 * @param {Axis[]} axes
 * @param {number} batchSize images per batch
 * @returns {{ graph: ApiGraph, targets: string[] } | undefined} targets: ids of the preview nodes, one per batch, in
 *   the order of the images; undefined if no output image depends on the Slider Prompt
 */
export function sweepGraph(graph, id, definitions, axes, batchSize) {
  const dependent = descendants(graph, [id])
  const image = firstImage(graph, dependent, definitions)
  if (!image) return
  const required = ancestors(graph, [image[0]])
  const chain = dependent.filter((key) => required.has(key))
  const latents = latentInputs(graph, chain, definitions)
  const strengths = sweepStrengths(axes)
  const swept = { ...graph }
  const targets = []
  for (let first = 0; first < strengths.length; first += batchSize) {
    const batch = strengths.slice(first, first + batchSize)
    const copyId = (/** @type {string} */ key) => `sweep${first}_${key.replaceAll(':', '_')}`
    const lists = axes.map((_, k) => copyId(`strengths${k}`))
    lists.forEach((list, k) => {
      const values = batch.map((strengthsOfImage) => strengthsOfImage[k]).join(', ')
      swept[list] = { class_type: 'EditSlidersStrengthList', inputs: { values } }
    })
    for (const key of chain) {
      const inputs = Object.fromEntries(
        Object.entries(graph[key].inputs).map(([input, value]) => [
          input,
          isLink(value) && chain.includes(value[0]) ? [copyId(value[0]), value[1]] : value
        ])
      )
      if (key === id) axes.forEach(({ slider }, k) => (inputs[`strength_${slider + 1}`] = [lists[k], 0]))
      const input = latents.get(key)
      if (input) {
        const repeated = copyId(`latent_${key}`)
        const strengths = [lists[0], 0]
        swept[repeated] = { class_type: 'EditSlidersLatentForSweep', inputs: { latent: inputs[input], strengths } }
        inputs[input] = [repeated, 0]
      }
      swept[copyId(key)] = { ...graph[key], inputs }
    }
    const preview = copyId('images')
    swept[preview] = { class_type: 'PreviewImage', inputs: { images: [copyId(image[0]), image[1]] } }
    targets.push(preview)
  }
  return { graph: swept, targets }
}

/**
 * The link to the image of the first output node among `dependent` that takes one from a node among `dependent`.
 * @param {ApiGraph} graph @param {string[]} dependent @param {Definitions} definitions
 */
function firstImage(graph, dependent, definitions) {
  for (const id of outputNodes(graph, dependent, definitions)) {
    const { inputs, class_type: type } = graph[id]
    const link = Object.entries(inputs).find(
      ([input, value]) => inputType(definitions[type], input) === IMAGE && isLink(value) && dependent.includes(value[0])
    )?.[1]
    if (isLink(link)) return link
  }
}

/**
 * The nodes with both a linked latent input and a latent output, mapped to the name of that input. There the batch is
 * repeated to the number of strengths with the same noise for all images, also where a batch has been decoded to pixels
 * and encoded again, which loses batch_index.
 * @param {ApiGraph} graph @param {string[]} chain @param {Definitions} definitions
 * @returns {Map<string, string>}
 */
function latentInputs(graph, chain, definitions) {
  const names = new Map()
  for (const id of chain) {
    const definition = definitions[graph[id].class_type]
    const input = Object.entries(graph[id].inputs).find(
      ([name, value]) => inputType(definition, name) === LATENT && isLink(value)
    )?.[0]
    if (input && hasOutputType(graph, id, definitions, LATENT)) names.set(id, input)
  }
  return names
}

/** @param {Definition | undefined} definition @param {string} input */
function inputType(definition, input) {
  return { ...definition?.input?.required, ...definition?.input?.optional }[input]?.[0]
}

/** @param {ApiGraph} graph @param {string} id @param {Definitions} definitions @param {string} type */
function hasOutputType(graph, id, definitions, type) {
  return definitions[graph[id]?.class_type]?.output?.includes(type) ?? false
}
