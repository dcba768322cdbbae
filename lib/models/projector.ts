import { MgmError } from '../errors.ts'
import { linear } from '../ops.ts'
import type { Tensor } from '../tensor.ts'
import { advance, type Loader, under, type Weights } from './loader.ts'

interface Layer {
  weight: Tensor
  bias: Tensor
}

/**
 * From the vision channels to the decoder's: `linear`, `mlpNx_gelu` (N linears with exact GELUs between them) or
 * `identity`. Source: `build_vision_projector` of MGM.
 */
export class Projector {
  private readonly layers: readonly Layer[]

  private constructor(layers: readonly Layer[]) {
    this.layers = layers
  }

  /** `weights` holds `mm_projector.…`; `type` is the config's `mm_projector_type`. */
  static async load(
    loader: Loader,
    weights: Weights,
    type: string,
    input: number,
    output: number,
  ): Promise<Projector> {
    const projector = new Projector(
      layerNames(type, input, output).map((name, i) => {
        const names = under(weights, name)
        return {
          weight: loader.linear(names.take('weight', [output, i === 0 ? input : output])),
          bias: loader.f32(names.take('bias', [output])),
        }
      }),
    )
    await loader.pause()
    return projector
  }

  /** x [T, input] → [T, output]; `identity` returns x itself. */
  forward(x: Tensor): Tensor {
    const last = this.layers.length - 1
    return this.layers.reduce((h, { weight, bias }, i) => {
      const layer = (h: Tensor) => linear(h, weight, { bias, activation: i < last ? 'gelu' : 'none' })
      return i === 0 ? layer(h) : advance(h, layer)
    }, x)
  }
}

function layerNames(type: string, input: number, output: number): string[] {
  if (type === 'linear') return ['mm_projector.']
  const depth = /^mlp([1-9]\d?)x_gelu$/.exec(type)?.[1]
  // The GELUs take the odd places of the reference's nn.Sequential.
  if (depth) return Array.from({ length: Number(depth) }, (_, i) => `mm_projector.${2 * i}.`)
  if (type === 'identity') {
    if (input === output) return []
    throw new MgmError(
      'CHECKPOINT_INVALID',
      `expected mm_hidden_size and hidden_size to be equal for an identity projector but received ${input} and ${output}`,
    )
  }
  throw new MgmError(
    'CHECKPOINT_UNSUPPORTED',
    `expected linear, mlpNx_gelu or identity for mm_projector_type but received "${type}"`,
  )
}
