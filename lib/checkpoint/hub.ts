import { createHash, type Hash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import {
  copyFile,
  mkdir,
  open,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { dirname, join, relative } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  fileDownloadInfo,
  getHFHubCachePath,
  getRepoFolderName,
  HubApiError,
  type ListFileEntry,
  listFiles,
  modelInfo,
} from '@huggingface/hub'
import { describe, expected, MgmError, throwIfAborted } from '../errors.ts'

/** Told while a file is downloaded: at its start, at most ten times a second, and at its end. Bytes. */
export interface DownloadProgress {
  readonly phase: 'download'
  /** Path within the repository. */
  readonly file: string
  readonly loaded: number
  readonly total: number
}

export interface ResolveOptions {
  /** Hub cache; default as other Hugging Face libraries: `HF_HUB_CACHE`, `HF_HOME`, or `~/.cache/huggingface/hub`. */
  readonly cacheDir?: string | undefined
  /** Branch, tag or commit. Default `main`. */
  readonly revision?: string | undefined
  /** Access token for private and gated repositories. Default `HF_TOKEN`. */
  readonly token?: string | undefined
  /** Hub to ask. Default `HF_ENDPOINT` or https://huggingface.co. */
  readonly endpoint?: string | undefined
  /** Which of the repository's files to fetch, instead of `selectFiles`. */
  readonly include?: ((path: string) => boolean) | undefined
  /** Use the cache only. Default `HF_HUB_OFFLINE`. */
  readonly offline?: boolean | undefined
  readonly onProgress?: ((event: DownloadProgress) => void) | undefined
  readonly signal?: AbortSignal | undefined
}

const COMMIT = /^[0-9a-f]{40}$/
const REPO_ID = /^[A-Za-z0-9][A-Za-z0-9._-]{0,95}\/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$/
const MAX_STALLS = 4
const RETRY_DELAY_MS = 200

/**
 * The folder of a checkpoint: an existing folder as it is, or the snapshot of a hub repository `owner/name`, downloaded
 * into the cache that all Hugging Face libraries share. Interrupted files are resumed, every file is checked against the
 * size and hash that the hub lists. When the hub cannot be reached a complete cached snapshot is used.
 *
 * @throws INVALID_ARGUMENT for what is neither a folder nor a repository; DOWNLOAD_FAILED, which names repository, file
 *   and status; ABORTED
 */
export async function resolveCheckpoint(pathOrId: string, options: ResolveOptions = {}): Promise<string> {
  const { signal } = options
  throwIfAborted(signal)
  if (typeof pathOrId !== 'string' || pathOrId === '')
    throw expected('a folder or owner/name', 'checkpoint', pathOrId)
  const local = await stat(pathOrId).catch(() => undefined)
  if (local?.isDirectory()) return pathOrId
  if (local) throw expected('a folder', 'checkpoint', `the file ${pathOrId}`)
  if (!REPO_ID.test(pathOrId) || pathOrId.includes('..')) {
    throw expected('an existing folder or a hub repository owner/name', 'checkpoint', pathOrId)
  }
  return new Download(pathOrId, options).run()
}

/** Where `mgm` looks for SDXL unless told otherwise. */
export const SDXL_REPOSITORY = 'stabilityai/stable-diffusion-xl-base-1.0'

/**
 * The files a checkpoint needs of those a repository holds: configurations, tokenizers and weights. Safetensors are
 * preferred to .bin files and fp16 variants to full ones of the same name, folder by folder; training leftovers are left
 * out. Of a diffusers repository (`model_index.json`), the folders of SDXL's components with one kind of weights each.
 */
export function selectFiles(paths: readonly string[]): string[] {
  if (paths.includes('model_index.json')) return selectPipelineFiles(paths)
  const all = new Set(paths)
  const hasSafetensors = new Set(
    paths.filter(path => path.endsWith('.safetensors')).map(path => dirname(path)),
  )
  return paths.filter(path => {
    const name = path.split('/').at(-1)!
    if (/^(training_args|optimizer|scheduler)\.bin$/.test(name)) return false
    if (/\.(json|model|tiktoken)$/.test(name) || name === 'merges.txt' || name === 'vocab.txt') return true
    if (!/\.(safetensors|bin)$/.test(name)) return false
    if (name.endsWith('.bin') && hasSafetensors.has(dirname(path))) return false
    return !all.has(path.replace(/\.(safetensors|bin)$/, '.fp16.$1'))
  })
}

const PIPELINE_FOLDERS = [
  'scheduler',
  'text_encoder',
  'text_encoder_2',
  'tokenizer',
  'tokenizer_2',
  'unet',
  'vae',
]
/** Weights, shards and indices by the names that diffusers and transformers give them, with or without variant. */
const COMPONENT_WEIGHTS =
  /^(?:model|pytorch_model|diffusion_pytorch_model)(\.fp16)?(?:-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)(?:\.index(\.fp16)?\.json)?$/
/** The preferred kind first, as `openDiffusion` takes them. */
const WEIGHT_KINDS = ['fp16.safetensors', 'safetensors', 'fp16.bin', 'bin']

function selectPipelineFiles(paths: readonly string[]): string[] {
  const kindOf = (path: string): string | undefined => {
    const match = COMPONENT_WEIGHTS.exec(path.split('/').at(-1)!)
    return match ? `${match[1] || match[2] || match[4] ? 'fp16.' : ''}${match[3]}` : undefined
  }
  const chosen = new Map(
    PIPELINE_FOLDERS.map(folder => {
      const kinds = paths.filter(path => dirname(path) === folder && isWeight(path)).map(kindOf)
      return [folder, WEIGHT_KINDS.find(kind => kinds.includes(kind))]
    }),
  )
  return paths.filter(path => {
    if (path === 'model_index.json') return true
    const folder = dirname(path)
    if (!chosen.has(folder)) return false
    const kind = kindOf(path)
    return kind ? kind === chosen.get(folder) : /\.json$|\/merges\.txt$/.test(path)
  })
}

/** One file of the repository with what is needed to fetch and check it. */
interface RemoteFile {
  readonly path: string
  readonly size: number
  /** Name of its blob in the cache. */
  readonly etag: string
  readonly hash: 'sha256' | 'git' | undefined
}

// Downloads of one blob in this process wait for each other.
const running = new Map<string, Promise<unknown>>()

class Download {
  readonly #repo: string
  readonly #options: ResolveOptions
  readonly #endpoint: string
  readonly #revision: string
  readonly #storage: string
  readonly #fetch: typeof fetch
  readonly #access: { accessToken?: string }

  constructor(repo: string, options: ResolveOptions) {
    const endpoint = options.endpoint ?? process.env.HF_ENDPOINT ?? 'https://huggingface.co'
    const revision = options.revision ?? 'main'
    const token = options.token ?? process.env.HF_TOKEN
    if (!/^https?:\/\//.test(endpoint) || !URL.canParse(endpoint))
      throw expected('a http(s) URL', 'endpoint', endpoint)
    if (!isSafePath(revision) || !/^[\w./+-]+$/.test(revision)) {
      throw expected('a branch, tag or commit', 'revision', revision)
    }
    if (token && !token.startsWith('hf_'))
      throw expected('a token that begins with hf_', 'token', 'another string')
    this.#repo = repo
    this.#options = options
    this.#endpoint = endpoint.replace(/\/+$/, '')
    this.#revision = revision
    this.#storage = join(
      options.cacheDir ?? getHFHubCachePath(),
      getRepoFolderName({ type: 'model', name: repo }),
    )
    this.#access = token ? { accessToken: token } : {}
    this.#fetch = (input, init) => fetch(input, { ...init, signal: options.signal ?? null })
  }

  async run(): Promise<string> {
    const cached = await this.#findCached()
    const offline = this.#options.offline ?? /^(1|true|yes|on)$/i.test(process.env.HF_HUB_OFFLINE ?? '')
    if (cached && (offline || COMMIT.test(this.#revision))) return cached
    if (offline) throw this.#failure('no complete snapshot is in the cache and offline use was asked for')

    let commit: string
    let files: RemoteFile[]
    try {
      commit = await this.#readCommit()
      files = await this.#listFiles(commit)
    } catch (error) {
      throwIfAborted(this.#options.signal)
      if (cached && isConnectionFailure(error)) return cached
      throw this.#wrap(error)
    }
    const snapshot = join(this.#storage, 'snapshots', commit)
    for (const file of files) {
      try {
        await this.#ensure(file, commit, join(snapshot, file.path))
      } catch (error) {
        throwIfAborted(this.#options.signal)
        throw this.#wrap(error, file.path)
      }
    }
    if (this.#revision !== commit) {
      // Written last, so that a reference always leads to a whole snapshot.
      const ref = join(this.#storage, 'refs', this.#revision)
      await mkdir(dirname(ref), { recursive: true })
      await writeFile(ref, commit)
    }
    return snapshot
  }

  async #findCached(): Promise<string | undefined> {
    let commit = this.#revision
    if (!COMMIT.test(commit)) {
      commit = await readFile(join(this.#storage, 'refs', this.#revision), 'utf8').then(
        text => text.trim(),
        () => '',
      )
    }
    if (!COMMIT.test(commit)) return undefined
    const snapshot = join(this.#storage, 'snapshots', commit)
    return (await isComplete(snapshot, this.#options.include !== undefined)) ? snapshot : undefined
  }

  async #readCommit(): Promise<string> {
    const info = await modelInfo({
      name: this.#repo,
      revision: this.#revision,
      hubUrl: this.#endpoint,
      additionalFields: ['sha'],
      fetch: this.#fetch,
      ...this.#access,
    })
    if (!COMMIT.test(info.sha)) throw this.#failure(`the hub answered with the commit ${describe(info.sha)}`)
    return info.sha
  }

  async #listFiles(commit: string): Promise<RemoteFile[]> {
    const entries = new Map<string, ListFileEntry>()
    for await (const entry of listFiles({
      repo: { type: 'model', name: this.#repo },
      revision: commit,
      recursive: true,
      hubUrl: this.#endpoint,
      fetch: this.#fetch,
      ...this.#access,
    })) {
      if (entry.type !== 'file') continue
      if (typeof entry.path !== 'string' || !isSafePath(entry.path)) {
        throw this.#failure(`its file name ${describe(entry.path)} leads out of the folder`)
      }
      entries.set(entry.path, entry)
    }
    const paths = [...entries.keys()]
    const { include } = this.#options
    const wanted = include ? paths.filter(path => include(path)) : selectFiles(paths)
    if (wanted.length === 0) throw this.#failure(`none of its ${paths.length} files belongs to a checkpoint`)
    // Weights come last: where they are, the rest is.
    const rank = (path: string) => Number(isWeight(path))
    return wanted.sort((a, b) => rank(a) - rank(b)).map(path => this.#describe(entries.get(path)!))
  }

  #describe(entry: ListFileEntry): RemoteFile {
    const size = entry.lfs?.size ?? entry.size
    const etag = entry.lfs?.oid ?? entry.xetHash ?? entry.oid
    if (!Number.isSafeInteger(size) || size < 0)
      throw this.#failure(`the hub lists the size ${size}`, entry.path)
    if (typeof etag !== 'string' || !/^[0-9A-Za-z]{8,128}$/.test(etag)) {
      throw this.#failure(`the hub lists the hash ${describe(etag)}`, entry.path)
    }
    const isSha256 = entry.lfs !== undefined && /^[0-9a-f]{64}$/.test(etag)
    const isGit = etag === entry.oid && COMMIT.test(etag)
    return { path: entry.path, size, etag, hash: isSha256 ? 'sha256' : isGit ? 'git' : undefined }
  }

  async #ensure(file: RemoteFile, commit: string, pointer: string): Promise<void> {
    const blob = join(this.#storage, 'blobs', file.etag)
    const previous = running.get(blob) ?? Promise.resolve()
    const task = previous
      .catch(() => undefined)
      .then(async () => {
        throwIfAborted(this.#options.signal)
        if ((await sizeOf(pointer)) === file.size) return
        await mkdir(dirname(blob), { recursive: true })
        await mkdir(dirname(pointer), { recursive: true })
        if ((await sizeOf(blob)) !== file.size) await this.#fetchBlob(file, commit, blob)
        await rm(pointer, { force: true })
        await symlink(relative(dirname(pointer), blob), pointer).catch(() => copyFile(blob, pointer))
      })
    running.set(blob, task)
    try {
      await task
    } finally {
      if (running.get(blob) === task) running.delete(blob)
    }
  }

  /** Downloads into `blob.incomplete`, from where an earlier try ended, and renames it when its hash is right. */
  async #fetchBlob(file: RemoteFile, commit: string, blob: string): Promise<void> {
    const partial = `${blob}.incomplete`
    let loaded = (await sizeOf(partial)) ?? 0
    if (loaded > file.size) loaded = 0
    let hash = await startHash(file, partial, loaded, this.#options.signal)
    let reported = 0
    const report = (always: boolean) => {
      const now = performance.now()
      if (!always && now - reported < 100) return
      reported = now
      this.#options.onProgress?.({ phase: 'download', file: file.path, loaded, total: file.size })
    }
    report(true)

    const handle = await open(partial, loaded > 0 ? 'r+' : 'w')
    try {
      await handle.truncate(loaded)
      // An empty file is there already; asking for its first byte would be an error.
      for (let stalls = 0; loaded < file.size; ) {
        const before = loaded
        try {
          const response = await this.#request(file, commit, loaded)
          if (response.status === 200 && loaded > 0) {
            loaded = 0
            hash = await startHash(file, partial, 0, this.#options.signal)
            await handle.truncate(0)
          }
          for await (const chunk of response.body ?? []) {
            if (loaded + chunk.length > file.size) {
              throw this.#failure(`more than the listed ${file.size} bytes came`, file.path)
            }
            for (let at = 0; at < chunk.length; ) {
              at += (await handle.write(chunk, at, chunk.length - at, loaded + at)).bytesWritten
            }
            hash?.update(chunk)
            loaded += chunk.length
            report(false)
          }
          if (loaded < file.size)
            throw new Error(`the connection ended after ${loaded} of ${file.size} bytes`)
        } catch (error) {
          throwIfAborted(this.#options.signal)
          if (!isTransient(error)) throw error
          stalls = loaded > before ? 0 : stalls + 1
          if (stalls >= MAX_STALLS) throw error
          await sleep(RETRY_DELAY_MS * 2 ** stalls, undefined, { signal: this.#options.signal }).catch(
            () => undefined,
          )
          throwIfAborted(this.#options.signal)
        }
      }
      await handle.sync()
    } finally {
      await handle.close()
    }
    const digest = hash?.digest('hex')
    if (digest !== undefined && digest !== file.etag) {
      await rm(partial, { force: true })
      throw this.#failure(`its content has the hash ${digest}, not ${file.etag}; try again`, file.path)
    }
    await rename(partial, blob)
    report(true)
  }

  async #request(file: RemoteFile, commit: string, start: number): Promise<Response> {
    const info = await fileDownloadInfo({
      repo: { type: 'model', name: this.#repo },
      path: file.path.split('/').map(encodeURIComponent).join('/'),
      revision: commit,
      hubUrl: this.#endpoint,
      fetch: this.#fetch,
      ...this.#access,
    })
    if (!info) throw this.#failure('the hub answered with status 404', file.path)
    if (info.size !== file.size) {
      throw this.#failure(`the hub lists ${file.size} bytes but offers ${info.size}`, file.path)
    }
    const etag = info.etag.replace(/^W\//, '').replaceAll('"', '')
    if (
      file.hash &&
      /^([0-9a-f]{40}|[0-9a-f]{64})$/.test(etag) &&
      etag.length === file.etag.length &&
      etag !== file.etag
    ) {
      throw this.#failure(`the hub lists the hash ${file.etag} but offers ${etag}`, file.path)
    }
    const url = new URL(info.url)
    const isHub = url.origin === new URL(this.#endpoint).origin
    const { accessToken } = this.#access
    const response = await this.#fetch(url, {
      headers: {
        // A compressed body could not be resumed.
        'Accept-Encoding': 'identity',
        ...(start > 0 && { Range: `bytes=${start}-` }),
        ...(accessToken && isHub && { Authorization: `Bearer ${accessToken}` }),
      },
    })
    if (response.status !== 200 && response.status !== 206) throw new HubApiError(url.href, response.status)
    if (response.status === 206) {
      const range = /^bytes (\d+)-\d+\/(\d+)$/.exec(response.headers.get('content-range') ?? '')
      if (!range || Number(range[1]) !== start || Number(range[2]) !== file.size) {
        throw this.#failure(
          `expected the range from ${start} of ${file.size} but the hub sent ${describe(response.headers.get('content-range'))}`,
          file.path,
        )
      }
    }
    return response
  }

  #failure(what: string, file?: string, options?: ErrorOptions): MgmError {
    const where = `${file === undefined ? '' : `${file} of `}${this.#repo}@${this.#revision} at ${this.#endpoint}`
    return new MgmError('DOWNLOAD_FAILED', `cannot download ${where}: ${what}`, options)
  }

  #wrap(error: unknown, file?: string): MgmError {
    if (error instanceof MgmError) return error
    if (error instanceof HubApiError) {
      const { statusCode } = error
      const advice =
        statusCode === 401 || statusCode === 403
          ? '; give a token that may read it, and accept its licence on the hub if it is gated'
          : statusCode === 404
            ? '; check its name and revision, or give a token if it is private'
            : ''
      return this.#failure(`the hub answered with status ${statusCode}${advice}`, file, { cause: error })
    }
    const cause = (error as Error).cause
    const reason =
      cause instanceof Error ? `${(error as Error).message} (${cause.message})` : (error as Error).message
    return this.#failure(reason, file, { cause: error })
  }
}

/** Whether a repository's file name stays within the folder it is put in, on any system. */
function isSafePath(path: string): boolean {
  return (
    path !== '' &&
    // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
    !/[\\\0-\x1f]/.test(path) &&
    path.split('/').every(part => part !== '' && part !== '.' && part !== '..' && !/^[A-Za-z]:/.test(part))
  )
}

function isWeight(path: string): boolean {
  return /\.(safetensors|bin)$/.test(path)
}

async function sizeOf(path: string): Promise<number | undefined> {
  return stat(path).then(
    ({ size }) => size,
    () => undefined,
  )
}

/** The hash the hub lists, fed with the part that is already there. */
async function startHash(
  file: RemoteFile,
  partial: string,
  loaded: number,
  signal: AbortSignal | undefined,
): Promise<Hash | undefined> {
  if (file.hash === undefined) return undefined
  const hash = createHash(file.hash === 'sha256' ? 'sha256' : 'sha1')
  if (file.hash === 'git') hash.update(`blob ${file.size}\0`)
  if (loaded > 0) {
    for await (const chunk of createReadStream(partial, { end: loaded - 1, ...(signal && { signal }) })) {
      hash.update(chunk as Buffer)
    }
  }
  return hash
}

/** Whether every file that the snapshot names is there: no dangling links, all shards of every index, some weights. */
async function isComplete(snapshot: string, isPart: boolean): Promise<boolean> {
  let paths: string[]
  try {
    const entries = await readdir(snapshot, { recursive: true, withFileTypes: true })
    paths = entries
      .filter(entry => !entry.isDirectory())
      .map(entry => relative(snapshot, join(entry.parentPath, entry.name)))
    if (paths.length === 0 || !(isPart || paths.some(isWeight))) return false
    const present = new Set(paths)
    for (const path of paths) {
      await stat(join(snapshot, path))
      if (!/\.index(\.\w+)?\.json$/.test(path)) continue
      const index = JSON.parse(await readFile(join(snapshot, path), 'utf8'))
      // The index of the .bin shards stays where only the safetensors were fetched.
      const shards = [...new Set(Object.values(index?.weight_map ?? {}))].map(shard =>
        join(dirname(path), String(shard)),
      )
      const isUsed = path.includes('.safetensors.index.') || !paths.some(p => p.endsWith('.safetensors'))
      if (isUsed && !shards.every(shard => present.has(shard))) return false
    }
  } catch {
    return false
  }
  return true
}

/** Whether trying again may help: not after wrong answers, nor when the disk fails (fetch keeps its errors in `cause`). */
function isTransient(error: unknown): boolean {
  if (error instanceof MgmError || (error as NodeJS.ErrnoException).syscall !== undefined) return false
  if (error instanceof HubApiError)
    return error.statusCode >= 500 || [408, 416, 429].includes(error.statusCode)
  return true
}

function isConnectionFailure(error: unknown): boolean {
  if (error instanceof MgmError) return false
  return !(error instanceof HubApiError) || error.statusCode >= 500 || error.statusCode === 429
}
