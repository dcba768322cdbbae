import type { Context } from 'hono'
import type { ContentfulStatusCode } from 'hono/utils/http-status'
import { MgmError, type MgmErrorCode } from '../errors.ts'
import type { WireError } from './wire.ts'

/** What can be wrong with a request before the model sees it. */
export type HttpErrorCode =
  | 'FORBIDDEN'
  | 'NOT_FOUND'
  | 'METHOD_NOT_ALLOWED'
  | 'TOO_LARGE'
  | 'UNSUPPORTED_MEDIA_TYPE'

const HTTP_STATUS: Record<HttpErrorCode, ContentfulStatusCode> = {
  FORBIDDEN: 403,
  NOT_FOUND: 404,
  METHOD_NOT_ALLOWED: 405,
  TOO_LARGE: 413,
  UNSUPPORTED_MEDIA_TYPE: 415,
}

// What is not named here is the server's fault: 500.
const MGM_STATUS: Partial<Record<MgmErrorCode, ContentfulStatusCode>> = {
  INVALID_ARGUMENT: 400,
  IMAGE_INVALID: 400,
  CONTEXT_OVERFLOW: 400,
  QUEUE_FULL: 429,
  UNSUPPORTED: 501,
  OUT_OF_MEMORY: 503,
  DEVICE_LOST: 503,
  ABORTED: 503,
  CLOSED: 503,
}

/** A request that is refused before the model sees it. */
export class HttpError extends Error {
  readonly code: HttpErrorCode
  constructor(code: HttpErrorCode, message: string) {
    super(message)
    this.name = 'HttpError'
    this.code = code
  }
}

/** Whether an error tells of a bug rather than of a request. */
export function isBug(error: unknown): boolean {
  return !(error instanceof HttpError || (error instanceof MgmError && error.code !== 'INTERNAL'))
}

/** What a client is told of an error. Of what is no error of ours, only that it happened. */
export function wireError(error: unknown): { status: ContentfulStatusCode; error: WireError } {
  if (error instanceof HttpError)
    return { status: HTTP_STATUS[error.code], error: { code: error.code, message: error.message } }
  if (error instanceof MgmError && !isBug(error))
    return { status: MGM_STATUS[error.code] ?? 500, error: { code: error.code, message: error.message } }
  return {
    status: 500,
    error: { code: 'INTERNAL', message: 'the server failed; where it was started it says more' },
  }
}

/** The one error reply: a page for browsers, JSON for everybody else. */
export function errorReply(c: Context, cause: unknown): Response {
  const { status, error } = wireError(cause)
  if (status === 429) c.header('Retry-After', '1')
  return c.req.header('accept')?.includes('text/html')
    ? c.html(errorPage(status, error), status)
    : c.json({ error }, status)
}

function errorPage(status: number, { code, message }: WireError): string {
  return `<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>${status} ${escapeHtml(code)}</title>
    <link rel="icon" href="data:,">
    <link rel="stylesheet" href="/style.css">
  </head>
  <body class="error-page">
    <main>
      <h1>${status}</h1>
      <p><code>${escapeHtml(code)}</code></p>
      <p>${escapeHtml(message)}</p>
      <p><a href="/">To the page</a></p>
    </main>
  </body>
</html>
`
}

const ENTITIES: Record<string, string> = {
  '&': '&amp;',
  '<': '&lt;',
  '>': '&gt;',
  '"': '&quot;',
  "'": '&#39;',
}

function escapeHtml(text: string): string {
  return text.replace(/[&<>"']/g, character => ENTITIES[character]!)
}
