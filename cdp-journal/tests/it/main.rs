//! Tests of the library as its users see it, on the real file system.

mod damage;
mod kit;
mod replay;
mod speed;
mod store;
