import { linear, packLinear } from '../lib/ops.ts'
import { scope } from '../lib/tensor.ts'
import {
  assertFinite,
  fmaLimit,
  Peer,
  type Row,
  race,
  randomTensor,
  type Settings,
  versusLimit,
  versusPeer,
} from './harness.ts'

/** x Wᵀ with M = N = K: how much of the multiply-adds that the cores can do at all. */
export async function gemm(settings: Settings): Promise<Row[]> {
  const { device, quick } = settings
  const limit = fmaLimit(device)
  const rows: Row[] = []
  for (const size of quick ? [512, 1024] : [1024, 2048, 4096]) {
    const work = 2 * size ** 3
    const x = randomTensor(device, [size, size])
    const source = randomTensor(device, [size, size], 0.03)
    const weights = (['f32', 'bf16', 'int8', 'int4'] as const).map(dtype => ({
      dtype,
      w: packLinear(source, { dtype }),
    }))
    const subjects = weights.map(({ dtype, w }) => ({
      name: dtype as string,
      run: async () => {
        scope(() => void linear(x, w))
        await device.synchronize()
        return undefined
      },
    }))
    for (const { dtype, w } of weights) {
      const y = linear(x, w)
      await assertFinite(`${dtype} ${size}`, y)
      y.dispose()
    }
    const peer = await Peer.start(settings, 'torch_peer.py', ['gemm', String(device.threads), String(size)])
    const { timings, limits } = await race(peer ? [...subjects, peer] : subjects, {
      rounds: quick ? 3 : size <= 2048 ? 15 : 7,
      limits: [limit],
    })
    peer?.stop()
    const rates = limits.get(limit.name)!
    for (const { dtype } of weights)
      rows.push(
        versusLimit(
          'gemm',
          `${dtype} M=N=K=${size}`,
          timings.get(dtype)!,
          work,
          { name: limit.name, rates, threads: device.threads },
          'GFLOP/s',
          dtype === 'f32' ? 0.8 : undefined,
        ),
      )
    if (peer) {
      const theirs = { name: peer.name, timing: timings.get(peer.name)! }
      rows.push(versusPeer('gemm', `f32 M=N=K=${size}`, timings.get('f32')!, theirs, { work }))
    }
    for (const tensor of [x, source, ...weights.map(({ w }) => w)]) tensor.dispose()
  }
  return rows
}
