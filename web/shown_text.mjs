// Shows on a node the text of its last run: what a file is, which tokens belong to which slider, warnings.

import { app } from '../../scripts/app.js'
import { t } from './texts.mjs'

const NODES = [
  'EditSlidersLoadAdapter',
  'EditSlidersLoadProjector',
  'EditSlidersEncodeSubInstructions',
  'EditSlidersProjectorStrength',
  'EditSlidersInvertPhotograph',
  'EditSlidersSaveTrajectory',
  'EditSlidersLoadTrajectory',
  'EditSlidersRememberSource',
  'EditSlidersRememberTrajectory'
]
const MIN_HEIGHT = 80

/** @param {LGraphNode} node */
export function showText(node) {
  if (!NODES.includes(node.comfyClass ?? '')) return
  const made = app.widgets.STRING(node, 'shown', ['STRING', { multiline: true }], app)
  const widget = /** @type {ElementWidget} */ (made.widget)
  widget.label = ' '
  widget.serialize = false
  Object.assign(widget.options, { serialize: false, read_only: true, getMinHeight: () => MIN_HEIGHT })
  widget.element.readOnly = true
  widget.element.placeholder = t('shownAfterARun')

  const executed = node.onExecuted
  node.onExecuted = function (output) {
    executed?.call(this, output)
    widget.value = output.text?.join('\n') ?? ''
  }
}
