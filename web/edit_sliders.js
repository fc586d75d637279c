// Registers the pack's page extension with ComfyUI.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { addCurve, NODE as CALIBRATED_STRENGTH, reattachCurve } from './calibration/node.mjs'
import { listenForJobs } from './shared/job_runner.mjs'
import { labelOptions } from './shared/option_labels.mjs'
import { SETTINGS } from './shared/settings.mjs'
import { addTextOutput, registerTextOutput } from './shared/text_output.mjs'
import { loadTexts } from './shared/texts.mjs'
import { addSliders, reattachSliders, slidersOf } from './slider_prompt/node.mjs'
import { NODE as SLIDER_PROMPT } from './slider_prompt/queued_graph.mjs'
import { clearSweeps } from './slider_prompt/sweep.mjs'

const VERSION = '0.2.0'
const REPOSITORY = 'https://github.com/edit-sliders/ComfyUI-EditSliders'

app.registerExtension({
  name: 'EditSliders',
  settings: /** @type {any[]} */ (SETTINGS),
  aboutPageBadges: [{ label: `Edit Sliders ${VERSION}`, url: REPOSITORY, icon: 'pi pi-github' }],
  commands: [
    command('ToggleLive', 'Edit Sliders: Toggle Live', 'pi pi-bolt', (sliders) => sliders.setLive(!sliders.isLive)),
    command('Reset', 'Edit Sliders: Reset All Sliders to 1', 'pi pi-undo', (sliders) => sliders.view.reset()),
    command('Sweep', 'Edit Sliders: Render Sweep', 'pi pi-images', (sliders) => sliders.sweepPanel.render())
  ],
  keybindings: [
    { combo: { key: 'l', alt: true, shift: true }, commandId: 'EditSliders.ToggleLive' },
    { combo: { key: 'r', alt: true, shift: true }, commandId: 'EditSliders.Reset' },
    { combo: { key: 's', alt: true, shift: true }, commandId: 'EditSliders.Sweep' }
  ],

  async init() {
    listenForJobs(api)
    api.addEventListener('graphCleared', clearSweeps)
    await loadTexts(api, String(app.extensionManager.setting.get('Comfy.Locale')))
  },

  setup() {
    app.canvas.canvas.addEventListener('litegraph:set-graph', reattachAll)
  },

  beforeRegisterNodeDef(_, definition) {
    registerTextOutput(definition)
  },

  nodeCreated(node) {
    if (node.comfyClass?.startsWith('EditSliders')) labelOptions(node)
    if (node.comfyClass === SLIDER_PROMPT) addSliders(node)
    else if (node.comfyClass === CALIBRATED_STRENGTH) addCurve(node)
    else addTextOutput(node)
  },

  afterConfigureGraph: reattachAll
})

/** Update the pack's nodes after the page has changed to another graph or another state of the graph. */
function reattachAll() {
  for (const node of app.canvas.graph?.nodes ?? []) {
    reattachSliders(node)
    reattachCurve(node)
  }
}

/**
 * A command for the selected Edit Strength Sliders nodes, or for all of the current graph if none is selected.
 * @param {string} name
 * @param {string} label
 * @param {string} icon
 * @param {(sliders: NonNullable<ReturnType<typeof slidersOf>>) => void} run
 */
function command(name, label, icon, run) {
  return {
    id: `EditSliders.${name}`,
    label,
    icon,
    function: () => {
      const all = (app.canvas.graph?.nodes ?? []).map((node) => ({ node, sliders: slidersOf(node) }))
      const selected = all.filter(({ node }) => app.canvas.selectedItems.has(node))
      const targets = selected.some(({ sliders }) => sliders) ? selected : all
      for (const { sliders } of targets) if (sliders) run(sliders)
    }
  }
}
