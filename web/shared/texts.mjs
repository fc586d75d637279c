// The texts of the pack's own page elements, in the language of the page, from locales/<language>/main.json.

const FALLBACK = 'en'

/** @type {Record<string, string>} */
const texts = {}

/** @type {Record<string, string>} Value of a combo option -> its label. */
const optionLabels = {}

/**
 * Load the texts; those missing in a language are in English.
 * @param {{ fetchApi: (path: string) => Promise<Response> }} server
 * @param {string} language code as in ComfyUI's setting Comfy.Locale, such as 'zh'
 */
export async function loadTexts(server, language) {
  const response = await server.fetchApi('/i18n')
  if (!response.ok) return
  const locales = await response.json()
  Object.assign(texts, locales[FALLBACK]?.editSliders, locales[language]?.editSliders)
  Object.assign(optionLabels, locales[FALLBACK]?.editSlidersOptions, locales[language]?.editSlidersOptions)
}

/**
 * The text with this key, with {0}, {1} ... replaced by the values. The key itself if there is no such text.
 * @param {string} key
 * @param {...(string | number)} values
 */
export function t(key, ...values) {
  return (texts[key] ?? key).replace(/\{(\d)\}/g, (_, k) => String(values[Number(k)]))
}

/**
 * Whether there is a label for this value of a combo option.
 * @param {unknown} value
 */
export function isLabeledOption(value) {
  return String(value) in optionLabels
}

/**
 * The label of a combo option; its value if there is none.
 * @param {string | null} [value]
 */
export function optionLabel(value) {
  return optionLabels[value ?? ''] ?? value ?? ''
}
