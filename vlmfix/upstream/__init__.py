"""What vlmfix uses of transformers, torch and timm beyond their documented surface: one small function for each.

This is the only room that imports modules below ``transformers``' top level, reads or writes an attribute of another
package's object that begins with an underscore, or spells the names under which transformers hands values inward
(``names.py``). A missing name raises ``UpstreamError``; nothing here guesses or goes on without. ``contracts.py`` lists
what is relied on, each with a probe. ``make lint`` holds the other rooms to it.
"""
