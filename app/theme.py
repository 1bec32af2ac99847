"""Colours and type of Gradio's own components; assets/page.css has the rest, with the same colours as variables."""

from __future__ import annotations

import gradio as gr


def theme() -> gr.themes.Base:
    # Of the fonts that come with Gradio only some have all letters; this one has, in these two weights.
    plain = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))
    code = gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700))
    return gr.themes.Base(
        primary_hue=gr.themes.colors.sky,
        neutral_hue=gr.themes.colors.slate,
        spacing_size="sm",
        radius_size="md",
        font=[plain, "system-ui", "sans-serif"],
        font_mono=[code, "ui-monospace", "monospace"],
    ).set(
        body_background_fill="#f3f5f8",
        body_background_fill_dark="#0c1219",
        body_text_color="#16202c",
        body_text_color_dark="#e8eef5",
        block_background_fill="#ffffff",
        block_background_fill_dark="#141c26",
        block_border_color="#dfe5ec",
        block_border_color_dark="#263241",
        block_shadow="none",
        input_background_fill="#ffffff",
        input_background_fill_dark="#0f161f",
        slider_color="#0072b2",
        slider_color_dark="#3b8fd1",
        button_primary_background_fill="#0b5c8f",
        button_primary_background_fill_hover="#094b75",
        button_primary_background_fill_dark="#1f7ab5",
        button_primary_background_fill_hover_dark="#2b8ccb",
        button_primary_text_color="#ffffff",
        color_accent_soft="#e6f1f9",
        color_accent_soft_dark="#16354f",
    )
