// A read-only text box on nodes that return a text for the page (ui.PreviewText): file metadata, tokens, warnings.

import { app } from '../../../scripts/app.js'
import { t } from './texts.mjs'

const PREFIX = 'EditSliders'
const MIN_HEIGHT = 80

/** @type {Set<string>} */
const nodeTypes = new Set()

/**
 * Remember a node type if its nodes have a text output: those of this pack with has_intermediate_output in the schema.
 * @param {{ name: string, has_intermediate_output?: boolean }} definition as in /object_info
 */
export function registerTextOutput({ name, has_intermediate_output }) {
  if (name.startsWith(PREFIX) && has_intermediate_output) nodeTypes.add(name)
}

/** Add the text box, which shows the text of the node's last run. @param {LGraphNode} node of any type */
export function addTextOutput(node) {
  if (!nodeTypes.has(node.comfyClass ?? '')) return
  const created = app.widgets.STRING(node, 'shown', ['STRING', { multiline: true }], app)
  const widget = /** @type {TextAreaWidget} */ (created.widget)
  widget.label = ' '
  widget.serialize = false
  Object.assign(widget.options, { serialize: false, read_only: true, getMinHeight: () => MIN_HEIGHT })
  widget.element.readOnly = true
  widget.element.placeholder = t('shownAfterRun')

  const { onExecuted } = node
  node.onExecuted = function (output) {
    onExecuted?.call(this, output)
    widget.value = output.text?.join('\n') ?? ''
  }
}
