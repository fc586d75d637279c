// Shows on a node the text of its last run: what a file is, which tokens belong to which slider, warnings.

import { app } from '../../scripts/app.js'

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

app.registerExtension({
  name: 'EditSliders.ShownText',

  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return
    const { widget } = app.widgets.STRING(node, 'shown', ['STRING', { multiline: true }], app)
    widget.label = ' '
    widget.serialize = false
    Object.assign(widget.options, { serialize: false, read_only: true, getMinHeight: () => MIN_HEIGHT })
    widget.inputEl.readOnly = true
    widget.inputEl.placeholder = 'shown after a run'

    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.call(this, output)
      widget.value = output.text?.join('\n') ?? ''
    }
  }
})
