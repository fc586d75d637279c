// What the text encoders make of the phrases, as the server knows it.

import { post } from './own_jobs.mjs'

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
    try {
      const answer = await post(this.server, '/edit_sliders/tokens', JSON.parse(asked))
      const { phrases } = await answer.json()
      if (asked !== this.asked) return
      this.phrases = phrases
      this.error = phrases.find((/** @type {PhraseTokens} */ phrase) => phrase.error)?.error ?? ''
    } catch (error) {
      if (asked !== this.asked) return
      this.error = error instanceof Error ? error.message : String(error)
    }
    this.onAnswer()
  }
}
