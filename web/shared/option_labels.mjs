// Labels of the options in the pack's combo widgets. The values, which workflows and the API use, stay as they are.

import { isLabeledOption, optionLabel } from './texts.mjs'

/**
 * Show the options of a node's combo widgets by their labels, where any of them has one.
 * @param {LGraphNode} node
 */
export function labelOptions(node) {
  for (const widget of node.widgets ?? []) {
    const values = widget.type === 'combo' ? widget.options.values : undefined
    if (Array.isArray(values) && values.some(isLabeledOption)) widget.options.getOptionLabel = optionLabel
  }
}
