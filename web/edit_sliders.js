// The pack's part of ComfyUI's page.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { settleCurve, showCurve } from './calibration/node.mjs'
import { SETTINGS } from './settings.mjs'
import { showText } from './shown_text.mjs'
import { addSliders, forgetFilms, NODE, settle, slidersOf } from './slider_prompt/node.mjs'
import { listen } from './slider_prompt/own_jobs.mjs'
import { loadTexts } from './texts.mjs'

const VERSION = '0.1.0'
const HOME = 'https://github.com/edit-sliders/ComfyUI-EditSliders'

app.registerExtension({
  name: 'EditSliders',
  settings: /** @type {any[]} */ (SETTINGS),
  aboutPageBadges: [{ label: `Edit Sliders ${VERSION}`, url: HOME, icon: 'pi pi-github' }],
  commands: [
    command('ToggleLive', 'Edit Sliders: live on or off', 'pi pi-bolt', (sliders) => sliders.setLive(!sliders.isLive)),
    command('Reset', 'Edit Sliders: all sliders to 1', 'pi pi-undo', (sliders) => sliders.view.reset()),
    command('Sweep', 'Edit Sliders: render the sweep', 'pi pi-images', (sliders) => sliders.renderSweep())
  ],
  keybindings: [
    { combo: { key: 'l', alt: true, shift: true }, commandId: 'EditSliders.ToggleLive' },
    { combo: { key: 'r', alt: true, shift: true }, commandId: 'EditSliders.Reset' },
    { combo: { key: 's', alt: true, shift: true }, commandId: 'EditSliders.Sweep' }
  ],

  async init() {
    listen(api)
    api.addEventListener('graphCleared', forgetFilms)
    await loadTexts(api, String(app.extensionManager.setting.get('Comfy.Locale')))
  },

  setup() {
    app.canvas.canvas.addEventListener('litegraph:set-graph', settleAll)
  },

  nodeCreated(node) {
    showText(node)
    showCurve(node)
    if (node.comfyClass === NODE) addSliders(node)
  },

  afterConfigureGraph: settleAll
})

/** Another graph is shown, or another state of it. */
function settleAll() {
  for (const node of app.canvas.graph?.nodes ?? []) {
    settle(node)
    settleCurve(node)
  }
}

/**
 * A command for the selected Slider Prompts, or for all of the graph that is shown if none is selected.
 * @param {string} name
 * @param {string} label
 * @param {string} icon
 * @param {(sliders: NonNullable<ReturnType<typeof slidersOf>>) => void} act
 */
function command(name, label, icon, act) {
  return {
    id: `EditSliders.${name}`,
    label,
    icon,
    function: () => {
      const shown = (app.canvas.graph?.nodes ?? []).map((node) => ({ node, sliders: slidersOf(node) }))
      const chosen = shown.filter(({ node }) => app.canvas.selectedItems.has(node))
      const some = chosen.some(({ sliders }) => sliders) ? chosen : shown
      for (const { sliders } of some) if (sliders) act(sliders)
    }
  }
}
