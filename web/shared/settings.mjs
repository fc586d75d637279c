// The pack's entries in ComfyUI's settings dialog.

import { app } from '../../../scripts/app.js'

const CATEGORY = 'Edit Sliders'

/** @param {string} key @param {object} options */
const numeric = (key, options) => ({ id: settingId(key), type: 'number', ...options })

/** @param {string} key */
const settingId = (key) => `EditSliders.${key[0].toUpperCase()}${key.slice(1)}`

export const SETTINGS = [
  numeric('lowest', {
    name: 'Slider minimum of new nodes',
    category: [CATEGORY, 'Edit Strength Sliders', 'lowest'],
    defaultValue: -0.5,
    attrs: { min: -5, max: 0, step: 0.1, maxFractionDigits: 2 }
  }),
  numeric('highest', {
    name: 'Slider maximum of new nodes',
    category: [CATEGORY, 'Edit Strength Sliders', 'highest'],
    defaultValue: 2,
    attrs: { min: 0, max: 5, step: 0.1, maxFractionDigits: 2 }
  }),
  {
    id: settingId('live'),
    name: 'Live mode on in new nodes',
    tooltip: 'Live mode runs the workflow whenever a slider or the prompt of the node changes.',
    type: 'boolean',
    category: [CATEGORY, 'Live', 'live'],
    defaultValue: false
  },
  numeric('debounce', {
    name: 'Delay before a live run',
    tooltip: 'Milliseconds from the last change to the run.',
    category: [CATEGORY, 'Live', 'debounce'],
    defaultValue: 250,
    attrs: { min: 0, max: 5000, step: 50 }
  }),
  numeric('dragSteps', {
    name: 'Maximum sampling steps while dragging',
    tooltip: 'Limits live runs while a slider is dragged; on release all steps are run. 0 = no limit.',
    category: [CATEGORY, 'Live', 'dragSteps'],
    defaultValue: 0,
    attrs: { min: 0, max: 1000, step: 1 }
  })
]

/**
 * The value of one of the pack's settings.
 * @template {'lowest' | 'highest' | 'live' | 'debounce' | 'dragSteps'} Key
 * @param {Key} key
 * @returns {Key extends 'live' ? boolean : number}
 */
export function setting(key) {
  return /** @type {any} */ (app.extensionManager.setting.get(settingId(key)))
}
