{
  "targets": [
    {
      "target_name": "mgm",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake",
          "inputs": ["CMakeLists.txt"],
          "outputs": ["build/native/Release/mgm.node"],
          "action": ["node", "scripts/build-native.mjs"]
        }
      ]
    }
  ]
}
