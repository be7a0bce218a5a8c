"""The TAG-310k pipeline (the paper's Section 4 and Algorithm 1): filter -> generate -> validate -> eliminate.

`stages` is the algorithm for one face, `answer` checks what a model wrote, `prompts` what it is asked; `backends`,
`endpoints` (by way of `tag.endpoints`) and `local_model` are who answers; `store` keeps what is done; `build` runs it
over all faces.
"""
