import type { AddressInfo } from 'node:net'
import { createAdaptorServer } from '@hono/node-server'
import { expected, MgmError } from '../errors.ts'
import type { MiniGemini } from '../mini-gemini.ts'
import { type AppOptions, createApp } from './app.ts'
import { isLocalHost } from './guard.ts'

export interface ServeOptions extends AppOptions {
  /** Default 0: any that is free. */
  port?: number | undefined
  /** The address to listen on. Default 127.0.0.1. One that others can reach needs `hosts`. */
  host?: string | undefined
}

export interface WebServer {
  readonly url: string
  /** Ends all connections, and with them their requests. The model stays open. */
  close(): Promise<void>
}

/**
 * Serves the page of a model.
 *
 * @throws MgmError INVALID_ARGUMENT, also for a port that is taken or may not be used
 */
export async function serve(mgm: MiniGemini, options: ServeOptions = {}): Promise<WebServer> {
  const { port = 0, host = '127.0.0.1', ...app } = options
  if (!Number.isInteger(port) || port < 0 || port > 65535)
    throw expected('an integer from 0 to 65535', 'port', port)
  const name = host.includes(':') ? `[${host}]` : host
  if (!isLocalHost(name) && !(app.hosts && app.hosts.length > 0))
    throw expected('a local address, or the names that others may use in `hosts`,', 'host', host)
  const server = createAdaptorServer({ fetch: createApp(mgm, app).fetch, hostname: name })
  await new Promise<void>((resolve, reject) => {
    server.once('error', (cause: NodeJS.ErrnoException) => {
      const reasons: Record<string, string> = {
        EADDRINUSE: 'it is in use; take another one, or 0 for any that is free',
        EACCES: 'it may not be used without more rights; take one above 1023',
      }
      const reason = reasons[cause.code ?? ''] ?? cause.message
      reject(
        new MgmError('INVALID_ARGUMENT', `cannot listen on port ${port} of ${host}: ${reason}`, { cause }),
      )
    })
    server.listen(port, host, resolve)
  })
  return {
    url: `http://${name}:${(server.address() as AddressInfo).port}/`,
    close: () =>
      new Promise(resolve => {
        server.close(() => resolve())
        if ('closeAllConnections' in server) server.closeAllConnections()
      }),
  }
}
