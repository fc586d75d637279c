// What the DOM widgets of this pack's nodes have in common.

import { app } from '../../../scripts/app.js'

const FRAMES_AFTER_GRAPH_CHANGE = 30

/** Pass a wheel event on to the canvas, which zooms. Nodes 2.0 does that by itself. @param {WheelEvent} event */
export function forwardWheel(event) {
  if (!app.extensionManager.setting.get('Comfy.VueNodes.Enabled')) app.canvas.processMouseWheel(event)
}

/** ComfyUI's locator id of a node: its id, prefixed with the subgraph's id if it is in one. @param {LGraphNode} node */
export function locatorId({ graph, id }) {
  return graph && !graph.isRootGraph ? `${graph.id}:${id}` : `${id}`
}

/**
 * Whether the node is in its graph. False before a node is added, and after another one has taken its id.
 * @param {LGraphNode} node
 */
export function isInGraph(node) {
  return node.graph?.getNodeById(node.id) === node
}

/**
 * Put an element back into its node: Nodes 2.0 may keep the element of an earlier node with the same id.
 * @param {LGraphNode} node
 * @param {HTMLElement} element has a class of its own as its first class
 */
export function reattachElement(node, element) {
  if (element.isConnected || node.graph !== app.canvas.graph) return
  document.querySelector(`[data-node-id="${node.id}"] .${element.classList[0]}`)?.replaceWith(element)
}

/**
 * Call `update` in each of the next frames: the page sets the active workflow, the outputs and the elements of a graph
 * some frames after it has shown the graph.
 * @param {() => void} update
 */
export function updateAfterGraphChange(update, frames = FRAMES_AFTER_GRAPH_CHANGE) {
  if (!frames) return
  update()
  requestAnimationFrame(() => updateAfterGraphChange(update, frames - 1))
}
