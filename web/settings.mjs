// The pack's settings, by short names.

import { app } from '../../scripts/app.js'

const CATEGORY = 'Edit Sliders'

/** @param {string} name @param {object} rest */
const numeric = (name, rest) => ({ id: idOf(name), type: 'number', ...rest })

/** @param {string} name */
const idOf = (name) => `EditSliders.${name[0].toUpperCase()}${name.slice(1)}`

export const SETTINGS = [
  numeric('lowest', {
    name: 'Where the sliders of new nodes begin',
    category: [CATEGORY, 'Slider Prompt', 'lowest'],
    defaultValue: -0.5,
    attrs: { min: -5, max: 0, step: 0.1, maxFractionDigits: 2 }
  }),
  numeric('highest', {
    name: 'Where the sliders of new nodes end',
    category: [CATEGORY, 'Slider Prompt', 'highest'],
    defaultValue: 2,
    attrs: { min: 0, max: 5, step: 0.1, maxFractionDigits: 2 }
  }),
  {
    id: idOf('live'),
    name: 'New nodes are live',
    tooltip: 'The graph runs whenever something moves in them.',
    type: 'boolean',
    category: [CATEGORY, 'Live', 'live'],
    defaultValue: false
  },
  numeric('debounce', {
    name: 'Pause before a live run',
    tooltip: 'Milliseconds without a change.',
    category: [CATEGORY, 'Live', 'debounce'],
    defaultValue: 250,
    attrs: { min: 0, max: 5000, step: 50 }
  }),
  numeric('dragSteps', {
    name: 'Steps while a slider is dragged',
    tooltip: 'Live runs use at most this many until the slider is let go; then they run in full. 0 = always in full.',
    category: [CATEGORY, 'Live', 'dragSteps'],
    defaultValue: 0,
    attrs: { min: 0, max: 1000, step: 1 }
  })
]

/**
 * @template {'lowest' | 'highest' | 'live' | 'debounce' | 'dragSteps'} Name
 * @param {Name} name
 * @returns {Name extends 'live' ? boolean : number}
 */
export function setting(name) {
  return /** @type {any} */ (app.extensionManager.setting.get(idOf(name)))
}
