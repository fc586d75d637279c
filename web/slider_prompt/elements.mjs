// Short ways to make elements.

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} [name] its class
 * @param {Partial<HTMLElementTagNameMap[Tag]>} [properties]
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function element(tag, name = '', properties = {}) {
  return Object.assign(document.createElement(tag), { className: name }, properties)
}

/** @param {string} label @param {string} title @param {() => void} act */
export function button(label, title, act) {
  const made = element('button', '', { textContent: label, title, type: 'button' })
  made.addEventListener('click', act)
  return made
}
