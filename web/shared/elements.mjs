// Creates HTML elements.

/**
 * Create an element.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} [className]
 * @param {Partial<HTMLElementTagNameMap[Tag]>} [properties]
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function element(tag, className = '', properties = {}) {
  return Object.assign(document.createElement(tag), { className }, properties)
}

/** Create a button. @param {string} label @param {string} title its tooltip @param {() => void} onClick */
export function button(label, title, onClick) {
  const created = element('button', '', { textContent: label, title, type: 'button' })
  created.addEventListener('click', onClick)
  return created
}
