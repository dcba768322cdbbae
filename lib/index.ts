export type { Sampler } from './checkpoint/diffusers.ts'
export type { Answer, FinishReason, Timings, TokenLogprob } from './engine/answer.ts'
export type { EngineMetrics } from './engine/engine.ts'
export type { ImageMetrics, ImageStep, ImageTimings } from './engine/image-queue.ts'
export { MgmError, type MgmErrorCode } from './errors.ts'
export {
  type BatchOptions,
  type BatchResult,
  type GeneratedImage,
  type GenerateEvent,
  type GenerateResult,
  type ImagineResult,
  MiniGemini,
  type ModelInfo,
  type StreamEvent,
} from './mini-gemini.ts'
export type { ConversationName } from './processing/conversation.ts'
export type { ImageFormat } from './processing/encode.ts'
export type { MissingPrompt } from './processing/image-prompt.ts'
export type {
  ChatMessage,
  ChatRequest,
  DrawOptions,
  GenerateRequest,
  ImageSource,
  ImagineRequest,
  LoadOptions,
  ProgressEvent,
} from './request.ts'
