"""The workbook's own accuracy gate: a small trained DeepSeek-V4 and the task that it was trained on."""
