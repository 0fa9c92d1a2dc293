# SPDX-License-Identifier: Apache-2.0
"""Other implementations of the layer, to compare with: one file each, imported when asked for."""
