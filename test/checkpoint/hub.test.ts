import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { scanCacheDir } from '@huggingface/hub'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { type DownloadProgress, resolveCheckpoint, selectFiles } from '../../lib/checkpoint/hub.ts'

const COMMIT = 'c0ffee'.padEnd(40, '0')
const REPO = 'owner/tiny'
const sha256 = (data: Uint8Array) => createHash('sha256').update(data).digest('hex')
const gitHash = (data: Uint8Array) =>
  createHash('sha1').update(`blob ${data.length}\0`).update(data).digest('hex')

// 300 kB that are not all alike, so that a wrong offset shows.
const weights = Uint8Array.from({ length: 300_000 }, (_, i) => (i * 7919 + (i >> 8)) & 255)
const files: Record<string, Uint8Array> = {
  'config.json': Buffer.from('{"model_type":"mgm"}'),
  'tokenizer.model': Buffer.from('pieces'),
  'empty.json': Buffer.alloc(0),
  'model.safetensors': weights,
  'pytorch_model.bin': Buffer.from('old'),
  'README.md': Buffer.from('# hi'),
  'sub/config.json': Buffer.from('{}'),
}
const isLfs = (path: string) => /\.(safetensors|bin|model)$/.test(path)

/** What the imitated hub does besides its duty. */
interface Manners {
  token?: string
  /** Ends the connection after so many bytes of the weights, for as many requests. */
  cutAfter?: number
  cuts?: number
  ignoreRange?: boolean
  corrupt?: boolean
  status?: (url: string) => number | undefined
  extraEntry?: object
  hang?: boolean
  /** The CDN says it is one, so that its own URL is used for the body. */
  cloudfront?: boolean
}

let manners: Manners
let hub: Server
let cdn: Server
let endpoint: string
let folder: string
let requests: {
  url: string
  range?: string | undefined
  authorization?: string | undefined
  host: 'hub' | 'cdn'
}[]

const listen = async (handler: (request: IncomingMessage, response: ServerResponse) => void) => {
  const server = createServer(handler)
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
  return server
}
const urlOf = (server: Server) => `http://127.0.0.1:${(server.address() as AddressInfo).port}`

function sendFile(path: string, request: IncomingMessage, response: ServerResponse): void {
  let data = files[path]!
  if (manners.corrupt && path === 'model.safetensors') {
    data = Uint8Array.from(data)
    data[1000]! ^= 1
  }
  const range = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '')
  const isProbe = range?.[2] === '0'
  const headers = {
    etag: isLfs(path) ? '"some-cdn-etag"' : `"${gitHash(data)}"`,
    ...(manners.cloudfront && { 'x-cache': 'Hit from cloudfront' }),
  }
  if (range && (isProbe || !manners.ignoreRange)) {
    const start = Number(range[1])
    const end = range[2] ? Math.min(Number(range[2]), data.length - 1) : data.length - 1
    if (start >= data.length) return void response.writeHead(416).end()
    response.writeHead(206, {
      ...headers,
      'content-range': `bytes ${start}-${end}/${data.length}`,
      'content-length': end - start + 1,
    })
    data = data.subarray(start, end + 1)
  } else response.writeHead(200, { ...headers, 'content-length': data.length })
  const { cutAfter } = manners
  if (path === 'model.safetensors' && !isProbe && manners.hang) {
    response.write(data.subarray(0, 5000))
  } else if (path === 'model.safetensors' && !isProbe && cutAfter !== undefined && (manners.cuts ?? 0) > 0) {
    manners.cuts!--
    response.write(data.subarray(0, cutAfter), () => setTimeout(() => response.destroy(), 20))
  } else response.end(data)
}

beforeEach(async () => {
  manners = {}
  requests = []
  folder = mkdtempSync(join(tmpdir(), 'mgm-hub-'))
  cdn = await listen((request, response) => {
    const { range, authorization } = request.headers
    requests.push({ url: request.url!, range, authorization, host: 'cdn' })
    sendFile(decodeURIComponent(request.url!.slice(1)), request, response)
  })
  hub = await listen((request, response) => {
    const { range, authorization } = request.headers
    const url = request.url!
    requests.push({ url, range, authorization, host: 'hub' })
    const json = (value: unknown, headers = {}) => {
      response.writeHead(200, { 'content-type': 'application/json', ...headers }).end(JSON.stringify(value))
    }
    const status = manners.status?.(url)
    if (status)
      return void response.writeHead(status, { 'content-type': 'application/json' }).end('{"error":"no"}')
    if (manners.token && authorization !== `Bearer ${manners.token}`)
      return void response.writeHead(401).end()
    if (url.startsWith(`/api/models/${REPO}/revision/`)) return json({ id: REPO, _id: '1', sha: COMMIT })
    if (url.startsWith(`/api/models/${REPO}/tree/${COMMIT}`)) {
      const all = Object.entries(files).map(([path, data]) => ({
        type: 'file',
        path,
        size: data.length,
        oid: isLfs(path) ? gitHash(Buffer.from(path)) : gitHash(data),
        ...(isLfs(path) && { lfs: { oid: sha256(data), size: data.length, pointerSize: 130 } }),
      }))
      const listed = [
        { type: 'directory', path: 'sub', size: 0 },
        ...all,
        ...(manners.extraEntry ? [manners.extraEntry] : []),
      ]
      // Two pages, as long listings have.
      if (url.includes('cursor')) return json(listed.slice(3))
      return json(listed.slice(0, 3), { link: `<${endpoint}${url}&cursor=2>; rel="next"` })
    }
    const path = decodeURIComponent(url.replace(`/${REPO}/resolve/${COMMIT}/`, ''))
    if (!Object.hasOwn(files, path))
      return void response.writeHead(404, { 'x-error-code': 'EntryNotFound' }).end()
    if (isLfs(path)) {
      return void response
        .writeHead(302, { location: `${urlOf(cdn)}/${path}`, 'x-linked-etag': `"${sha256(files[path]!)}"` })
        .end()
    }
    sendFile(path, request, response)
  })
  endpoint = urlOf(hub)
})
afterEach(async () => {
  for (const server of [hub, cdn]) {
    server.closeAllConnections()
    await new Promise(resolve => server.close(resolve))
  }
  rmSync(folder, { recursive: true })
})

const resolve = (options: Parameters<typeof resolveCheckpoint>[1] = {}) =>
  resolveCheckpoint(REPO, { cacheDir: folder, endpoint, token: 'hf_secret', offline: false, ...options })
const blob = () => join(folder, 'models--owner--tiny', 'blobs', sha256(weights))
const bodyRanges = () =>
  requests
    .filter(r => r.host === 'cdn' && r.url.includes('safetensors') && r.range !== 'bytes=0-0')
    .map(r => r.range)

describe('resolveCheckpoint', () => {
  it('returns a local folder as it is', async () => {
    expect(await resolveCheckpoint(folder)).toBe(folder)
    expect(requests).toEqual([])
  })

  it('downloads the files of a checkpoint into the shared cache layout', async () => {
    const events: DownloadProgress[] = []
    const snapshot = await resolve({ onProgress: event => events.push(event) })
    expect(snapshot).toBe(join(folder, 'models--owner--tiny', 'snapshots', COMMIT))
    const wanted = ['config.json', 'empty.json', 'model.safetensors', 'sub/config.json', 'tokenizer.model']
    expect((readdirSync(snapshot, { recursive: true }) as string[]).filter(p => p !== 'sub').sort()).toEqual(
      wanted,
    )
    for (const path of wanted) expect(readFileSync(join(snapshot, path)).equals(files[path]!)).toBe(true)
    expect(readlinkSync(join(snapshot, 'sub/config.json'))).toBe(
      `../../../blobs/${gitHash(files['sub/config.json']!)}`,
    )
    expect(readFileSync(join(folder, 'models--owner--tiny', 'refs', 'main'), 'utf8')).toBe(COMMIT)
    expect(
      readdirSync(join(folder, 'models--owner--tiny', 'blobs')).some(name => name.includes('incomplete')),
    ).toBe(false)

    // The hub's own library finds the same.
    const { repos, warnings } = await scanCacheDir(folder)
    expect(warnings).toEqual([])
    expect(repos.map(repo => repo.id.name)).toEqual([REPO])
    expect(repos[0]!.revisions[0]).toMatchObject({ commitOid: COMMIT, refs: ['main'] })

    const ofWeights = events.filter(event => event.file === 'model.safetensors')
    expect(ofWeights[0]).toEqual({ phase: 'download', file: 'model.safetensors', loaded: 0, total: 300_000 })
    expect(ofWeights.at(-1)).toMatchObject({ loaded: 300_000 })
    expect(ofWeights.map(event => event.loaded)).toEqual(
      ofWeights.map(event => event.loaded).sort((a, b) => a - b),
    )
    expect(events.at(-1)!.file).toBe('model.safetensors')
    expect(requests.filter(r => r.host === 'cdn').every(r => r.authorization === undefined)).toBe(true)
    expect(requests.filter(r => r.host === 'hub').every(r => r.authorization === 'Bearer hf_secret')).toBe(
      true,
    )
  })

  it('does not show the token to a CDN', async () => {
    manners = { cloudfront: true }
    await resolve()
    const asked = requests.filter(r => r.url.endsWith('model.safetensors'))
    expect(asked.map(r => r.host)).toEqual(['hub', 'cdn', 'cdn'])
    expect(asked.map(r => r.authorization)).toEqual(['Bearer hf_secret', undefined, undefined])
  })

  it('downloads nothing twice', async () => {
    await resolve()
    requests = []
    await resolve()
    expect(requests.every(r => r.url.startsWith('/api/'))).toBe(true)
    requests = []
    expect(await resolve({ revision: COMMIT })).toContain(COMMIT)
    expect(requests).toEqual([])
  })

  it('goes on where a killed connection ended', async () => {
    manners = { cutAfter: 100_000, cuts: 1 }
    const snapshot = await resolve()
    const ranges = bodyRanges()
    expect(ranges).toHaveLength(2)
    expect(ranges[0]).toBeUndefined()
    expect(ranges[1]).toMatch(/^bytes=[1-9]\d*-$/)
    expect(readFileSync(join(snapshot, 'model.safetensors')).equals(weights)).toBe(true)
  })

  it('goes on where an earlier run was ended', async () => {
    manners = { hang: true }
    const controller = new AbortController()
    const onProgress = (event: DownloadProgress) => {
      if (event.file === 'model.safetensors') setTimeout(() => controller.abort(), 250)
    }
    await expect(resolve({ signal: controller.signal, onProgress })).rejects.toMatchObject({
      code: 'ABORTED',
    })
    expect(readFileSync(`${blob()}.incomplete`).equals(weights.subarray(0, 5000))).toBe(true)
    manners = {}
    requests = []
    const snapshot = await resolve()
    expect(bodyRanges()).toEqual(['bytes=5000-'])
    expect(readFileSync(join(snapshot, 'model.safetensors')).equals(weights)).toBe(true)
  })

  it('begins again where the server cannot resume', async () => {
    manners = { cutAfter: 100_000, cuts: 1, ignoreRange: true }
    expect(readFileSync(join(await resolve(), 'model.safetensors')).equals(weights)).toBe(true)
  })

  it('begins again where the partial file is longer than the file', async () => {
    mkdirSync(join(folder, 'models--owner--tiny', 'blobs'), { recursive: true })
    writeFileSync(`${blob()}.incomplete`, Buffer.alloc(300_001))
    expect(readFileSync(join(await resolve(), 'model.safetensors')).equals(weights)).toBe(true)
  })

  it('gives up on a server that never sends more', async () => {
    manners = { cutAfter: 0, cuts: 99 }
    await expect(resolve()).rejects.toThrow(/cannot download model\.safetensors of owner\/tiny@main at http/)
  })

  it('refuses content with the wrong hash and does not keep it', async () => {
    manners = { corrupt: true }
    await expect(resolve()).rejects.toThrow(
      /model\.safetensors of owner\/tiny.*its content has the hash [0-9a-f]{64}, not/,
    )
    expect(existsSync(blob())).toBe(false)
    expect(existsSync(`${blob()}.incomplete`)).toBe(false)
    // A partial file whose beginning is wrong is found out too, and the next run starts afresh.
    manners = {}
    writeFileSync(`${blob()}.incomplete`, Buffer.alloc(1000))
    await expect(resolve()).rejects.toMatchObject({ code: 'DOWNLOAD_FAILED' })
    expect(readFileSync(join(await resolve(), 'model.safetensors')).equals(weights)).toBe(true)
  })

  it.each([
    [401, /status 401; give a token/],
    [403, /status 403; give a token/],
    [404, /status 404; check its name and revision/],
    [500, /status 500/],
  ])('names repository and status %i', async (status, message) => {
    manners = { status: () => status }
    await expect(resolve()).rejects.toThrow(message)
    await expect(resolve()).rejects.toThrow(/cannot download owner\/tiny@main at http:/)
    await expect(resolve()).rejects.toMatchObject({ code: 'DOWNLOAD_FAILED' })
  })

  it('names the file that is refused', async () => {
    manners = {
      status: url => (url.includes('/resolve/') && url.endsWith('sub/config.json') ? 403 : undefined),
    }
    await expect(resolve()).rejects.toThrow(/cannot download sub\/config\.json of owner\/tiny.*status 403/)
  })

  it('reads private repositories with a token', async () => {
    manners = { token: 'hf_private' }
    await expect(resolve({ token: 'hf_wrong' })).rejects.toThrow(/status 401/)
    expect(await resolve({ token: 'hf_private' })).toContain(COMMIT)
    await expect(resolve({ token: 'secret' })).rejects.toThrow(
      /expected a token that begins with hf_ .* received "another string"/,
    )
  })

  it.each([
    '../evil.json',
    '/etc/evil.json',
    'a/../../evil.json',
    'a\\..\\evil.json',
    'C:/evil.json',
    'a//b.json',
    'a\0.json',
  ])('refuses the file name %j', async path => {
    manners = { extraEntry: { type: 'file', path, size: 1, oid: '0'.repeat(40) } }
    await expect(resolve()).rejects.toThrow(/leads out of the folder/)
    expect(readdirSync(folder)).toEqual([])
  })

  it.each([
    { size: -1, oid: '0'.repeat(40) },
    { size: 1.5, oid: '0'.repeat(40) },
    { size: 3, oid: '../../x' },
    { size: 3 },
  ])('refuses the listing %j', async entry => {
    manners = { extraEntry: { type: 'file', path: 'x.json', ...entry } }
    await expect(resolve()).rejects.toThrow(/cannot download x\.json of owner\/tiny.*the hub lists the/)
  })

  it('uses a complete cached snapshot when the hub cannot be reached, and no other', async () => {
    const dead = 'http://127.0.0.1:9'
    await expect(resolve({ endpoint: dead })).rejects.toMatchObject({ code: 'DOWNLOAD_FAILED' })
    const snapshot = await resolve()
    expect(await resolve({ endpoint: dead })).toBe(snapshot)
    expect(await resolve({ offline: true })).toBe(snapshot)
    manners = { status: () => 503 }
    expect(await resolve()).toBe(snapshot)
    // A refusal is an answer.
    manners = { status: () => 403 }
    await expect(resolve()).rejects.toThrow(/status 403/)
    rmSync(blob())
    await expect(resolve({ offline: true })).rejects.toThrow(/no complete snapshot is in the cache/)
    rmSync(join(snapshot, 'model.safetensors'))
    await expect(resolve({ offline: true })).rejects.toThrow(/no complete snapshot is in the cache/)
    writeFileSync(join(snapshot, 'model-00001-of-00002.safetensors'), 'x')
    expect(await resolve({ offline: true })).toBe(snapshot)
    writeFileSync(
      join(snapshot, 'model.safetensors.index.json'),
      '{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}',
    )
    await expect(resolve({ offline: true })).rejects.toThrow(/no complete snapshot is in the cache/)
    renameSync(
      join(snapshot, 'model.safetensors.index.json'),
      join(snapshot, 'model.safetensors.index.fp16.json'),
    )
    await expect(resolve({ offline: true })).rejects.toThrow(/no complete snapshot is in the cache/)
  })

  it('shares one download between two callers', async () => {
    const [a, b] = await Promise.all([resolve(), resolve()])
    expect(a).toBe(b)
    expect(bodyRanges()).toEqual([undefined])
  })

  it('fetches only what is asked for', async () => {
    const snapshot = await resolve({ include: path => path === 'README.md' })
    expect(readdirSync(snapshot)).toEqual(['README.md'])
    await expect(resolve({ include: () => false })).rejects.toThrow(
      /none of its 7 files belongs to a checkpoint/,
    )
  })

  it.each(['', './missing', '/missing', 'a/b/c', '../x', 'a', 'a/..', 'a..b/c'])('refuses %j', async name => {
    await expect(resolveCheckpoint(name, { cacheDir: folder, endpoint })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    })
  })

  it('refuses odd options', async () => {
    await expect(resolve({ revision: '../../x' })).rejects.toThrow(/expected a branch, tag or commit/)
    await expect(resolve({ endpoint: 'ftp://x' })).rejects.toThrow(/expected a http\(s\) URL/)
    await expect(resolve({ signal: AbortSignal.abort() })).rejects.toMatchObject({ code: 'ABORTED' })
    writeFileSync(join(folder, 'file'), '')
    await expect(resolveCheckpoint(join(folder, 'file'))).rejects.toThrow(/expected a folder for checkpoint/)
  })
})

describe('selectFiles', () => {
  it('prefers safetensors folder by folder and leaves training files', () => {
    expect(
      selectFiles([
        '.gitattributes',
        'README.md',
        'config.json',
        'tokenizer.model',
        'merges.txt',
        'notes.txt',
        'model-00001-of-00001.safetensors',
        'pytorch_model.bin',
        'training_args.bin',
        'tower/pytorch_model.bin',
        'tf_model.h5',
        'flax_model.msgpack',
      ]),
    ).toEqual([
      'config.json',
      'tokenizer.model',
      'merges.txt',
      'model-00001-of-00001.safetensors',
      'tower/pytorch_model.bin',
    ])
  })

  it('takes the fp16 components of a diffusers pipeline', () => {
    // What stabilityai/stable-diffusion-xl-base-1.0 holds.
    expect(
      selectFiles([
        '.gitattributes',
        'README.md',
        'comparison.png',
        'model_index.json',
        'scheduler/scheduler_config.json',
        'sd_xl_base_1.0.safetensors',
        'sd_xl_base_1.0_0.9vae.safetensors',
        'text_encoder/config.json',
        'text_encoder/flax_model.msgpack',
        'text_encoder/model.fp16.safetensors',
        'text_encoder/model.onnx',
        'text_encoder/model.safetensors',
        'text_encoder/openvino_model.bin',
        'text_encoder/openvino_model.xml',
        'tokenizer/merges.txt',
        'tokenizer/special_tokens_map.json',
        'tokenizer/tokenizer_config.json',
        'tokenizer/vocab.json',
        'unet/config.json',
        'unet/diffusion_flax_model.msgpack',
        'unet/diffusion_pytorch_model.fp16.safetensors',
        'unet/diffusion_pytorch_model.safetensors',
        'unet/model.onnx_data',
        'unet/openvino_model.bin',
        'vae/config.json',
        'vae/diffusion_pytorch_model.safetensors',
        'vae_1_0/config.json',
        'vae_1_0/diffusion_pytorch_model.fp16.safetensors',
        'vae_decoder/config.json',
        'vae_decoder/openvino_model.bin',
      ]),
    ).toEqual([
      'model_index.json',
      'scheduler/scheduler_config.json',
      'text_encoder/config.json',
      'text_encoder/model.fp16.safetensors',
      'tokenizer/merges.txt',
      'tokenizer/special_tokens_map.json',
      'tokenizer/tokenizer_config.json',
      'tokenizer/vocab.json',
      'unet/config.json',
      'unet/diffusion_pytorch_model.fp16.safetensors',
      'vae/config.json',
      'vae/diffusion_pytorch_model.safetensors',
    ])
  })

  const stem = 'unet/diffusion_pytorch_model'
  const shards = (name: string) => [1, 2].map(i => `${stem}${name.replace('#', `-0000${i}-of-00002`)}`)
  const archive = [`${stem}.bin`]
  const archives = [...archive, ...shards('#.bin'), `${stem}.bin.index.json`]
  const plain = [...archives, `${stem}.safetensors`, `${stem}.safetensors.index.json`]
  it.each([
    [
      'shards named after their variant',
      [...shards('.fp16#.safetensors'), `${stem}.safetensors.index.fp16.json`],
      plain,
    ],
    [
      'shards that end in their variant',
      [...shards('#.fp16.safetensors'), `${stem}.fp16.safetensors.index.json`],
      plain,
    ],
    ['shards without variant', [...shards('#.safetensors'), `${stem}.safetensors.index.json`], archives],
    ['an archive of the variant', [`${stem}.fp16.bin`], archives],
    ['an archive', archive, []],
  ])('takes %s with their index, and nothing of a lesser kind', (_, wanted, lesser) => {
    const others = ['unet/openvino_model.bin', `${stem}.non_ema.safetensors`]
    expect(selectFiles(['model_index.json', ...lesser, ...others, ...wanted])).toEqual([
      'model_index.json',
      ...wanted,
    ])
  })
})
