export { type AppOptions, createApp } from './app.ts'
export { type ServeOptions, serve, type WebServer } from './server.ts'
