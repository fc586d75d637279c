// What the pack's own elements say, in the language of the page: from locales/<language>/main.json.

const FALLBACK = 'en'

/** @type {Record<string, string>} */
const texts = {}

/**
 * @param {{ fetchApi: (path: string) => Promise<Response> }} server
 * @param {string} language as ComfyUI names it, such as 'zh'
 */
export async function loadTexts(server, language) {
  const answer = await server.fetchApi('/i18n')
  if (!answer.ok) return
  const all = await answer.json()
  Object.assign(texts, all[FALLBACK]?.editSliders, all[language]?.editSliders)
}

/**
 * A text by its name; {0}, {1} ... in it become the values.
 * @param {string} name
 * @param {...(string | number)} values
 */
export function t(name, ...values) {
  return (texts[name] ?? name).replace(/\{(\d)\}/g, (_, k) => String(values[Number(k)]))
}
