//! Tests of the library as its users see it, on the real file system.

#[cfg(test)]
mod damage;
#[cfg(test)]
mod index_crash;
#[cfg(test)]
mod kit;
#[cfg(test)]
mod replay;
#[cfg(test)]
mod speed;
#[cfg(test)]
mod store;
