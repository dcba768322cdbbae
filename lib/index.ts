export type { Answer, FinishReason, Timings, TokenLogprob } from './engine/answer.ts'
export type { EngineMetrics } from './engine/engine.ts'
export { MgmError, type MgmErrorCode } from './errors.ts'
export {
  type BatchOptions,
  type BatchResult,
  MiniGemini,
  type ModelInfo,
  type StreamEvent,
} from './mini-gemini.ts'
export type { ConversationName } from './processing/conversation.ts'
export type { ChatMessage, ChatRequest, ImageSource, LoadOptions, ProgressEvent } from './request.ts'
