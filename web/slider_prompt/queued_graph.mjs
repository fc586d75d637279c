// The page's graph as it is queued, and the Slider Prompt's ids in it.

import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { queuedNodeIds } from '../shared/api_graph.mjs'
import { t } from '../shared/texts.mjs'

/** @import { ApiGraph, Definitions } from '../shared/api_graph.mjs' */

export const NODE = 'EditSlidersSliderPrompt'

/** @type {ReturnType<typeof api.getNodeDefs> | undefined} requested once per page, since it is several megabytes */
let nodeDefinitions

/** The page's graph in API format and as a workflow, with the definitions of all node types. */
export async function queuedGraph() {
  nodeDefinitions ??= api.getNodeDefs()
  const [{ output, workflow }, definitions] = await Promise.all([app.graphToPrompt(), nodeDefinitions]).catch(error => {
    nodeDefinitions = undefined
    throw error
  })
  return {
    graph: /** @type {ApiGraph} */ (output),
    workflow,
    definitions: /** @type {Definitions} */ (/** @type {unknown} */ (definitions))
  }
}

/**
 * The ids of a Slider Prompt in a queued graph. Throws an Error if it is not queued.
 * @param {ApiGraph} graph
 * @param {LGraphNode} node
 */
export function sliderPromptIds(graph, node) {
  const ids = queuedNodeIds(graph, node.id, !node.graph?.isRootGraph).filter((id) => graph[id].class_type === NODE)
  if (!ids.length) throw new Error(t('notQueued'))
  return ids
}
