import { randomInt } from 'node:crypto'
import { Hono } from 'hono'
import { bodyLimit } from 'hono/body-limit'
import { methodNotAllowed } from 'hono/method-not-allowed'
import { renderPng } from '../demo/render.ts'
import { checkScene } from '../demo/scene.ts'
import { generateLesson } from '../demo/tasks.ts'
import { sceneSeed } from '../demo/world.ts'
import { expected, MgmError } from '../errors.ts'
import type { MiniGemini } from '../mini-gemini.ts'
import { type AssetName, loadAssets } from './assets.ts'
import { errorReply, HttpError, isBug } from './errors.ts'
import { eventStream } from './events.ts'
import { guard, headers } from './guard.ts'
import { takePictures } from './pictures.ts'
import { parseChatBody, parseDrawBody } from './schemas.ts'
import { answerEvents, drawEvents, generateEvents } from './turns.ts'
import type { InfoReply, SceneReply } from './wire.ts'

export interface AppOptions {
  /** Host names besides the local ones under which the server may be asked. Default: none. */
  hosts?: readonly string[] | undefined
  /** What the page says about the model. Default: what is true of the demo checkpoint. */
  about?: string | undefined
  /** Most bytes of a request. Default 8 MiB. */
  maxBody?: number | undefined
  /** Most pixels of a picture, checked before it is decoded. Default 16 million. */
  maxPixels?: number | undefined
  /** Side of the scenes that are drawn: what the model looks at. Default 256. */
  scenePixels?: number | undefined
  /** Gets what a client is not told: errors that are bugs. Default: console.error. */
  onError?: ((error: unknown) => void) | undefined
}

const ABOUT =
  'This is a small demo model of about 22 million parameters. It only knows drawn scenes of emoji and small signs, ' +
  'and it will be wrong about photos.'
const MIB = 2 ** 20
/** Scenes of the test split, which training never showed, are as many as this. */
const SCENES = 2 ** 40

/** The web page and its API, as an app to be served or extended. It does not close `mgm`. */
export function createApp(mgm: MiniGemini, options: AppOptions = {}): Hono {
  const { hosts = [], about = ABOUT, maxBody = 8 * MIB, maxPixels = 16e6, scenePixels = 256 } = options
  const log = options.onError ?? (error => console.error(error))
  const report = (error: unknown) => {
    if (isBug(error)) log(error)
  }

  const app = new Hono()
  app.onError((error, c) => {
    report(error)
    return errorReply(c, error)
  })
  app.notFound(c => errorReply(c, new HttpError('NOT_FOUND', `there is nothing at ${c.req.path}`)))
  app.use(headers())
  app.use(guard(hosts.map(name => name.toLowerCase())))
  app.use(
    methodNotAllowed({
      app,
      onMethodNotAllowed: (c, methods) => {
        c.header('Allow', methods.join(', '))
        return errorReply(c, new HttpError('METHOD_NOT_ALLOWED', `${c.req.path} takes ${methods.join(', ')}`))
      },
    }),
  )
  app.use(
    bodyLimit({
      maxSize: maxBody,
      onError: () => {
        throw new HttpError('TOO_LARGE', `expected at most ${maxBody} bytes for the request`)
      },
    }),
  )

  app.route('/', page())
  app.route('/api', api())
  return app

  function page(): Hono {
    const routes = new Hono()
    let loading: ReturnType<typeof loadAssets> | undefined
    const send = (path: string, name: AssetName) =>
      routes.get(path, async c => {
        loading ??= loadAssets()
        const { type, body } = (await loading)[name]
        return c.body(body, 200, { 'Content-Type': type, 'Cache-Control': 'no-cache' })
      })
    send('/', 'index.html')
    send('/style.css', 'style.css')
    send('/main.js', 'main.js')
    send('/licences.txt', 'licences.txt')
    return routes
  }

  function api(): Hono {
    const routes = new Hono()
    routes.get('/info', c => {
      const { family, threads, weightBytes, diffusion } = mgm.info
      const limits = { bodyBytes: maxBody, pixels: maxPixels }
      const drawnPixels = diffusion?.size ?? null
      const model = { family, device: mgm.device, threads, weightBytes }
      return c.json<InfoReply>({
        about,
        ...model,
        canDraw: diffusion !== null,
        drawnPixels,
        scenePixels,
        limits,
      })
    })

    routes.get('/scene', c => {
      const given = c.req.query('seed')
      const seed = given === undefined ? sceneSeed('test', randomInt(SCENES)) : Number(given || 'none')
      if (!Number.isSafeInteger(seed) || seed < 0) throw expected('an integer of at least 0', 'seed', given)
      return c.json(sceneReply(seed))
    })

    routes.post('/scene', async c => {
      const scene = checkScene(await jsonOf(c.req))
      const png = await renderPng(scene, scenePixels)
      return c.body(new Uint8Array(png), 200, { 'Content-Type': 'image/png', 'Cache-Control': 'no-store' })
    })

    routes.post('/chat', async c => {
      const { draw, messages, ...sampling } = parseChatBody(await jsonOf(c.req))
      const request = {
        ...sampling,
        messages: await takePictures(messages, maxPixels),
        allowSpecialTokens: false,
      }
      return eventStream(
        c.req.raw.signal,
        signal =>
          draw
            ? generateEvents(mgm, { ...request, signal }, draw)
            : answerEvents(mgm, { ...request, signal }),
        report,
      )
    })

    routes.post('/draw', async c => {
      const request = parseDrawBody(await jsonOf(c.req))
      return eventStream(c.req.raw.signal, signal => drawEvents(mgm, { ...request, signal }), report)
    })
    return routes
  }
}

async function jsonOf(request: {
  header(name: string): string | undefined
  text(): Promise<string>
}): Promise<unknown> {
  if (!/^application\/json\s*(;|$)/i.test(request.header('content-type') ?? ''))
    throw new HttpError('UNSUPPORTED_MEDIA_TYPE', 'expected application/json for the content type')
  try {
    return JSON.parse(await request.text())
  } catch (cause) {
    throw new MgmError('INVALID_ARGUMENT', 'expected JSON for the request body', { cause })
  }
}

function sceneReply(seed: number): SceneReply {
  const { scenes, examples } = generateLesson(seed)
  const asked = (pictures: number) => [
    ...new Set(
      examples
        .filter(example => example.pictures.length === pictures)
        .map(({ turns }) => turns[0]!)
        .filter(({ task }) => (pictures === 0 ? task === 'draw' : task !== 'draw' && task !== 'talk'))
        .map(({ question }) => question),
    ),
  ]
  const [first, second] = scenes
  return { seed, scenes: [first, second], questions: { first: asked(1), both: asked(2), draw: asked(0) } }
}
