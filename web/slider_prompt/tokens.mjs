// What the text encoders make of the phrases, as the server knows it.

/** @typedef {{ tokens: Record<string, string[]>, error: string }} PhraseTokens encoder -> pieces */

const PAUSE = 400

export class Tokens {
  /**
   * @param {{ fetchApi: (path: string, options?: RequestInit) => Promise<Response> }} server
   * @param {() => void} onAnswer
   */
  constructor(server, onAnswer) {
    this.server = server
    this.onAnswer = onAnswer
    this.asked = ''
    /** @type {PhraseTokens[]} of the text that was asked for last; empty until the answer is there */
    this.phrases = []
    this.error = ''
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined
  }

  /**
   * Ask soon, if this is not what was asked before.
   * @param {string} text
   * @param {string} mode
   */
  of(text, mode) {
    const asked = JSON.stringify({ text, mode })
    if (asked === this.asked) return
    this.asked = asked
    this.phrases = []
    this.error = ''
    clearTimeout(this.timer)
    this.timer = setTimeout(() => this.ask(asked), PAUSE)
  }

  /** @param {string} asked */
  async ask(asked) {
    const headers = { 'Content-Type': 'application/json' }
    const answer = await this.server.fetchApi('/edit_sliders/tokens', { method: 'POST', headers, body: asked })
    const { phrases = [], error = '' } = await answer.json().catch(() => ({}))
    if (asked !== this.asked) return
    this.phrases = phrases
    this.error = error || (phrases.find((/** @type {PhraseTokens} */ phrase) => phrase.error)?.error ?? '')
    this.onAnswer()
  }
}
