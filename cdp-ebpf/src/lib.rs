//! Shared layouts.
#![no_std]
