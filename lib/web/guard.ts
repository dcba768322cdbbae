import type { MiddlewareHandler } from 'hono'
import { secureHeaders } from 'hono/secure-headers'
import { HttpError } from './errors.ts'

/** Whether a host name, IPv6 in brackets, names this very machine. */
export function isLocalHost(name: string): boolean {
  return /^(localhost|127(\.\d{1,3}){3}|\[::1\])$/i.test(name)
}

/**
 * Refuses what other sites may send from a visitor's browser: requests under a host name that is not ours (DNS rebinding),
 * and writes from another origin. Programs, which send no Origin, pass.
 */
export function guard(hosts: readonly string[]): MiddlewareHandler {
  const isOurs = (name: string) => isLocalHost(name) || hosts.includes(name.toLowerCase())
  return async (c, next) => {
    const url = new URL(c.req.url)
    const host = c.req.header('host') ?? url.host
    for (const name of [hostName(host), url.hostname])
      if (!isOurs(name)) throw new HttpError('FORBIDDEN', 'this server answers to its own host name only')
    if (c.req.method !== 'GET' && c.req.method !== 'HEAD') {
      const origin = c.req.header('origin')
      const site = c.req.header('sec-fetch-site')
      const foreign =
        origin !== undefined
          ? origin !== `${url.protocol}//${host}`
          : site !== undefined && site !== 'same-origin' && site !== 'none'
      if (foreign) throw new HttpError('FORBIDDEN', 'this server takes requests of its own page only')
    }
    await next()
  }
}

function hostName(host: string): string {
  return host.replace(/:\d+$/, '')
}

/** Nothing but our own files runs in the page, and nothing else may embed it. */
export function headers(): MiddlewareHandler {
  return secureHeaders({
    contentSecurityPolicy: {
      defaultSrc: ["'none'"],
      scriptSrc: ["'self'"],
      styleSrc: ["'self'"],
      imgSrc: ["'self'", 'data:', 'blob:'],
      connectSrc: ["'self'"],
      baseUri: ["'none'"],
      formAction: ["'none'"],
      frameAncestors: ["'none'"],
    },
    xFrameOptions: 'DENY',
    // Of use behind https only.
    strictTransportSecurity: false,
  })
}
