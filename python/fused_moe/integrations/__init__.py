# SPDX-License-Identifier: Apache-2.0
"""Using this package from other frameworks: one module for each, imported only when asked for."""
