# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways in which a guest agent's commands travel: one module each, chosen by the source."""
