# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test bed: real QEMUs, a guest that boots, NBD servers, and tools to look at what they did."""
